"""Trajectories read back from files are the recorded calls, sample by sample."""

import pytest
import torch
from denoisers import SIZE, tiny_flux, tiny_pixart, tiny_sd3
from safetensors import safe_open
from tiny_students import TEXTS, pipeline, recorded, student, teacher, trajectories

from vqdm.calibration.recording import OUTPUT, PLAIN, Recorder, call_arguments, play
from vqdm.config.options import ModelConfig, SamplerConfig
from vqdm.distillation.trajectories import Trajectories, pack
from vqdm.models.loader import denoiser_of, load_pipeline, sample
from vqdm.seeds import torch_generator

OTHERS = {"pixart": (tiny_pixart, "dpm_solver"), "sd3": (tiny_sd3, "native"), "flux": (tiny_flux, "native")}


def flat(arguments, prefix=""):
    """The tensors among nested arguments, by dotted names."""
    found = {}
    for name, value in arguments.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def rows_of(call, caption, captions):
    """What one caption sees of a call, picked by hand: row `caption`, then each further `captions` rows on."""
    rows = list(range(caption, len(call[OUTPUT]), captions))
    picked = {}
    for name, value in call.items():
        if value.ndim == 0:
            picked[name] = value.repeat(len(rows))
        else:
            picked[name] = torch.stack([value[row] for row in rows])
    return picked


@pytest.mark.parametrize("guidance", [3.0, 0.0])
def test_samples_are_the_recorded_rows(guidance, tmp_path):
    calls, captions = recorded(3, guidance=guidance), len(TEXTS)
    found = trajectories(tmp_path, guidance=guidance)
    assert len(found) == 3 * captions
    chosen = [7, 0, 11, 7, 4]  # in any order, also twice
    batch = found.batch(chosen, device="cpu")
    assert batch.rows_each == (2 if guidance else 1)
    expected = [rows_of(calls[number // captions], number % captions, captions) for number in chosen]
    got = flat(batch.arguments) | {OUTPUT: batch.target}
    assert got.keys() == calls[0].keys()
    for name, value in got.items():
        assert torch.equal(value, torch.cat([rows[name] for rows in expected])), name
    timesteps = [int(calls[number // captions]["timestep"]) for number in chosen]
    assert batch.timesteps.tolist() == timesteps and len(set(timesteps)) == 3


def test_samples_of_several_numbers_of_steps_mix(tmp_path):
    for steps, texts in ((1, TEXTS), (3, TEXTS[:3])):
        trajectories(tmp_path, steps=steps, texts=texts)
    found = Trajectories(tmp_path.glob("*.safetensors"))
    assert len(found) == 4 + 9
    expected = [(recorded(1)[0], 2, 4), (recorded(3, TEXTS[:3])[2], 1, 3), (recorded(3, TEXTS[:3])[0], 0, 3)]
    batch = found.batch([2, 4 + 2 * 3 + 1, 4], device="cpu")
    rows = [rows_of(*one) for one in expected]
    for name, value in (flat(batch.arguments) | {OUTPUT: batch.target}).items():
        assert torch.equal(value, torch.cat([one[name] for one in rows])), name


def test_what_stays_the_same_is_there_once(tmp_path):
    calls = recorded(3)
    trajectories(tmp_path)
    moving = ("sample", "timestep", OUTPUT)
    each = sum(calls[0][name].nbytes for name in moving)
    once = sum(value.nbytes for name, value in calls[0].items() if name not in moving)
    with safe_open(tmp_path / "003.safetensors", "pt") as file:
        assert {key for key in file.keys() if key.startswith("each.")} == {f"each.{name}" for name in moving}  # noqa: SIM118
    size = (tmp_path / "003.safetensors").stat().st_size
    assert 3 * each + once <= size < 3 * each + once + 2000


@torch.no_grad()
def test_predictions_on_what_is_read_are_those_on_what_was_recorded(tmp_path):
    """Of the student too: under guidance rows lie in another order, which no prediction depends on."""
    calls, captions, own = recorded(3), len(TEXTS), student()
    batch = trajectories(tmp_path).batch(range(12), device="cpu")
    for model in (teacher(), own):
        whole = torch.stack([play(model, call_arguments(call, device="cpu")) for call in calls])
        expected = torch.cat([whole[n // captions, n % captions :: captions] for n in range(12)])
        got = play(model, batch.arguments)
        assert torch.allclose(got, expected, rtol=0, atol=2e-5)
    assert float((batch.target - got).square().mean()) > 1e-4, "the student is another"


@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_other_denoisers(kind, tmp_path):
    build, scheduler = OTHERS[kind]
    sampler = SamplerConfig(scheduler=scheduler, steps=2, guidance=3.0, size=SIZE)
    model = ModelConfig(name=kind, path=str(build(tmp_path / kind)), sampler=sampler)
    pipe = load_pipeline(model, device="cpu")
    for number, texts in enumerate((TEXTS[:3], TEXTS[3:])):
        generators = [torch_generator(0, "noise", text) for text in texts]
        with Recorder(denoiser_of(pipe), steps={0, 1}) as recorder:
            sample(pipe, list(texts), sampler=sampler, generators=generators, output="latent")
        (tmp_path / f"{number}.safetensors").write_bytes(pack(recorder.calls, captions=len(texts)))
        if number == 0:
            calls = recorder.calls
    found = Trajectories(tmp_path.glob("*.safetensors"))
    assert len(found) == 2 * 4
    batch = found.batch([5, 0, 7], device="cpu")  # second call's last caption, first call's first, the other file's
    rows = batch.rows_each
    assert rows == (1 if kind == "flux" else 2)
    expected = [calls[1][OUTPUT][2::3], calls[0][OUTPUT][0::3], recorder.calls[1][OUTPUT]]
    assert torch.equal(batch.target, torch.cat(expected))
    assert torch.allclose(play(denoiser_of(pipe), batch.arguments), batch.target, rtol=1e-4, atol=1e-5)
    assert batch.timesteps.tolist() == [float(c["timestep"].flatten()[0]) for c in (calls[1], calls[0], calls[1])]


def test_plain_arguments_are_no_rows(tmp_path):
    """Their JSON may happen to be as long as a call has rows."""
    text = b'{"flag":{"value":12}}'
    rows = len(text)
    call = {
        "sample": torch.arange(2.0 * rows).view(rows, 2),
        "timestep": torch.tensor(5),
        PLAIN: torch.tensor(list(text), dtype=torch.uint8),
        OUTPUT: torch.arange(rows).view(rows, 1) * 0.5,
    }
    (tmp_path / "a.safetensors").write_bytes(pack([call, call | {"timestep": torch.tensor(3)}], captions=rows))
    batch = Trajectories([tmp_path / "a.safetensors"]).batch([rows + 3, 1], device="cpu")
    assert batch.arguments["flag"] == 12 and batch.target.tolist() == [[1.5], [0.5]]
    assert batch.timesteps.tolist() == [3, 5] and batch.arguments["sample"].tolist() == [[6, 7], [2, 3]]


def test_arguments_that_cannot_be_kept_are_named(tmp_path):
    call = {"sample": torch.zeros(2, 1), "timestep": torch.tensor(1), OUTPUT: torch.zeros(2, 1)}
    plain = [call | {PLAIN: torch.tensor([number], dtype=torch.uint8)} for number in (1, 2)]
    with pytest.raises(ValueError, match="no tensor"):
        pack(plain, captions=2)
    for number in (1, 2):
        content = pack([call | {"table": torch.full((5,), float(number))}], captions=2)
        (tmp_path / f"{number}.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="table"):
        Trajectories(tmp_path.glob("*")).batch([0, 2], device="cpu")


def test_sampling_is_not_changed_by_what_is_kept():
    """The recorded outputs are those that the sampler went on with: the last latents follow from them."""
    texts, generators = TEXTS[:1], [torch_generator(0, "noise", TEXTS[0])]
    final = sample(pipeline(), list(texts), sampler=SamplerConfig(steps=3), generators=generators, output="latent")
    scheduler, calls = pipeline().scheduler, recorded(3, texts)
    scheduler.set_timesteps(3)
    latents = calls[0]["sample"][:1]
    for call in calls:
        assert torch.equal(call["sample"][:1], scheduler.scale_model_input(latents, call["timestep"]))
        without, with_text = call[OUTPUT].chunk(2)
        latents = scheduler.step(without + 3.0 * (with_text - without), call["timestep"], latents).prev_sample
    assert torch.equal(latents, final)
