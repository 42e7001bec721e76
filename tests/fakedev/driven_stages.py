"""Every stage through run.py, on the CPU and on the fake device: the same up to float32's last bits.

Codecs that decide weight after weight turn last bits of a Hessian into other codes of the same error, so their errors
are compared, and so are trained weights by their losses.

python -m pytest tests/fakedev/driven_stages.py    (in a process of its own)
"""

import json

import fake_device
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tiny_world import FEW, run

fake_device.register()
DEVICES = ("cpu", fake_device.NAME)
STUDENT = "quantize.hessian_from=student"
TRAINED = r"model.layers='(mid_block|up_blocks\.1).*(resnets\.0\.conv2|attentions\.0.*attn1\.to_(q|k|v))$'"
DISTIL = (
    "quantize=trellis2", "quantize.bits=2.5", TRAINED, "finetune.block_steps=5", "finetune.steps=6",
    "finetune.learning_rate=1e-3", "finetune.warmup=0", "finetune.batch_size=4", "finetune.check_every=3",
    "finetune.validation_samples=4", "finetune.trajectories.n=4", "finetune.trajectories.validation=2",
    "finetune.trajectories.batch_size=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A function that runs an experiment on both devices; {device: the directories of its stages}."""
    results = {device: tmp_path_factory.mktemp(device) for device in DEVICES}

    def run_both(*overrides):
        made = {}
        for device, folder in results.items():
            done = run("+experiment=tiny_codec", *FEW, *overrides, f"device={device}", f"results_dir={folder}")
            assert done.returncode == 0, done.stderr[-3000:]
            record = json.loads(
                max((folder / "runs").rglob("*.json"), key=lambda path: path.stat().st_mtime_ns).read_text()
            )
            made[device] = {name: folder / path for name, path in record["directories"].items()}
        return made

    return run_both


def read(directories, stage, name):
    """A JSON file of a stage on both devices."""
    return [json.loads((directories[device][stage] / name).read_text()) for device in DEVICES]


def weights(directories, stage):
    return [
        load_file(directories[device][stage] / "denoiser/diffusion_pytorch_model.safetensors") for device in DEVICES
    ]


def most_different(directories):
    """The largest difference of a pixel, in 255ths."""
    pairs = [sorted(directories[device]["generate"].rglob("*.png")) for device in DEVICES]
    assert len(pairs[0]) == len(pairs[1]) == 16
    images = [[np.asarray(Image.open(path)).astype(int) for path in paths] for paths in pairs]
    return max(int(np.abs(a - b).max()) for a, b in zip(*images, strict=True))


def check_scores(directories, *, psnr):
    """psnr: by how many dB images of other codes of the same error may lie elsewhere."""
    own, there = (
        {name: one["value"] for name, one in found["metrics"].items()}
        for found in read(directories, "evaluate", "metrics.json")
    )
    assert own.keys() == there.keys() and abs(own["psnr_to_fp"] - there["psnr_to_fp"]) <= psnr
    assert abs(own["clip_score"] - there["clip_score"]) < 1e-3 and abs(own["fidelity"] - there["fidelity"]) < 0.02


def check_errors(directories):
    """Errors of layers' outputs, or of blocks that were learned together."""
    own, there = (found["quantized"] for found in read(directories, "quantize", "layers.json"))
    for a, b in zip(own, there, strict=True):
        kind = next(kind for kind in ("relative_output_error", "learned", "relative_weight_error") if kind in a)
        assert abs(a[kind] - b[kind]) <= 0.1 * a[kind], (a["name"], kind, a[kind], b[kind])


def test_images_and_codes_that_do_not_depend_on_data(both):
    made = both("quantize=rtn4")
    own, there = weights(made, "quantize")
    assert all(np.array_equal(own[name], there[name]) for name in own.keys() | there.keys())
    assert most_different(made) <= 1
    check_scores(made, psnr=1e-4)
    protocol = read(made, "evaluate", "metrics.json")[1]["protocol"]
    assert protocol["device"] == fake_device.NAME and "TF32" in protocol["float32"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("quantize=gptq4", STUDENT),
        ("quantize=trellis3", STUDENT),
        ("quantize=vq3", STUDENT, "quantize.codebooks=model"),
        ("quantize=vq3", "quantize.codebooks=block"),
        (
            "quantize=adaround",
            "quantize.bits=4",
            "quantize.iterations=30",
            "quantize.samples=8",
            "quantize.batch_size=4",
        ),
    ],
)
def test_every_codec(both, overrides):
    """With the student's Hessians: in two groups and more, which all decode with the same shared part."""
    made = both(*overrides)
    assert most_different(made) <= 8
    check_scores(made, psnr=0.2)
    check_errors(made)


def test_sensitivity(both):
    """By the harm at 2 bits; at 3.5, that of so few layers lies among float32's last bits, and budgets follow it."""
    made = both("quantize=trellis3", "quantize.allocation=sensitivity")
    own, there = read(made, "sensitivity", "harm.json")
    for layer, harm in own.items():
        least = min(harm, key=float)
        assert abs(there[layer][least] - harm[least]) <= 0.2 * harm[least], layer
    assert most_different(made) <= 8


@pytest.mark.parametrize("kind", ["both", "codes"])
def test_both_distillations(both, kind):
    made = both(*DISTIL, f"finetune={kind}")
    own, there = (found["validations"] for found in read(made, "finetune", "history.json"))
    assert [one["step"] for one in own] == [one["step"] for one in there] and len(own) == 3
    assert all(abs(a["loss"] - b["loss"]) <= 0.05 * a["loss"] for a, b in zip(own, there, strict=True))
    check_scores(made, psnr=0.3)
