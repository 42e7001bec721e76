"""Every codec of CODECS by its card alone: named, planned, encoded, saved, loaded and distilled on a small U-Net."""

import copy
import functools

import pytest
import torch
from diffusers import UNet2DConditionModel
from unets import output, small_unet

from vqdm.calibration.collect import collect
from vqdm.calibration.recording import OUTPUT, Recorder, play_back
from vqdm.codecs.allocation import assign_schemes, planned_bits
from vqdm.codecs.cards import CODECS
from vqdm.codecs.encode import make_shared, matrix_of, users_of_shared
from vqdm.config.codecs import OPTIONS, parse_scheme
from vqdm.config.options import TrainedConfig
from vqdm.distillation.optimizer import RelativeAdam
from vqdm.distillation.parameters import trained_parameters
from vqdm.hub.checkpoint import checkpoint_size
from vqdm.hub.quantizer import attach
from vqdm.seeds import torch_generator
from vqdm.weights.bits import count_bits
from vqdm.weights.layers import quantized_layers, swap, swap_empty

PATTERN = r"(down_blocks\.1|mid_block).*(conv2|to_(q|k|v))$|up_blocks.*conv_shortcut$"
LAYERS = {"pattern": PATTERN, "min_size": 16}
NARROW = {"pattern": rf"{PATTERN}|^conv_out$", "min_size": 4}  # with a layer of four outputs
QUICK = {
    "trellis": {"bits": 6},
    "additive": {"bits": 2, "codebook_bits": 4},
    "svdquant": {"low_rank": 1, "bits": 6},
    "adaround": {"iterations": 4, "batch_size": 2, "split_shortcuts": True, "samples": 20},
}


@functools.cache
def recorded():
    """Eight calls of the small U-Net, of three samples each."""
    unet, generator = small_unet(), torch_generator(0, "calls")
    with Recorder(unet, steps=set(range(8))) as recorder, torch.no_grad():
        for _ in range(8):
            latents, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 32, generator=generator)
            unet(latents, torch.tensor([3, 300, 700]), text)
    return recorder.calls


def config_of(kind: str):
    config = OPTIONS[kind](**QUICK.get(kind, {}))
    config.check()
    return config


def quantize(unet, config, layers=LAYERS) -> None:
    """The layers of the pattern, in place."""
    codec, problems = CODECS[config.kind], assign_schemes(unet, config, **layers).quantized
    specs = [spec for spec, _ in problems]
    if codec.by_blocks is not None:
        options = {"config": config, "stored": lambda block: None, "progress": None}
        assert len(list(codec.by_blocks(unet, copy.deepcopy(unet), specs, lambda: iter(recorded()), **options))) > 1
        return
    shared = {key: make_shared(unet, users, config=config) for key, users in users_of_shared(problems).items()}
    hessians = {}
    if codec.needs_hessian(config):
        hessians = collect(unet, specs, lambda _: [play_back(unet, c, device="cpu") for c in recorded()], config=config)
    for spec, scheme in problems:
        weight = codec.encode(
            matrix_of(unet, spec), hessians.get(spec.name), scheme, config=config, layer=spec.name,
            shared=shared.get(scheme.shared_key),
        )  # fmt: skip
        assert codec.encoder_bytes(spec.shape, config) > 4 * spec.size
        swap(unet, spec, weight)


def distilled(student, *, steps: int) -> list[float]:
    """Losses of learning scales, codebooks or tables on the teacher's recorded predictions."""
    trained = trained_parameters(student.requires_grad_(False), TrainedConfig(biases=False, norms=False, rest=False))
    assert trained
    optimizer = RelativeAdam([(part.parameter.requires_grad_(), part.unit) for part in trained], lr=1e-3)
    call, losses = recorded()[0], []
    for _ in range(steps):
        optimizer.zero_grad()
        found = student(call["sample"], call["timestep"], call["encoder_hidden_states"]).sample
        loss = (found - call[OUTPUT]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_every_codec_has_options_and_a_card():
    assert set(CODECS) == set(OPTIONS) - {"none", "peer"}
    for kind, codec in CODECS.items():
        assert (codec.encode is None) != (codec.by_blocks is None), kind
        assert (codec.scheme is None) != (codec.assign is None), kind
        assert parse_scheme(OPTIONS[kind]().name).kind == kind


@pytest.mark.parametrize("kind", [*CODECS, "trellis beside a branch", "trellis beside a narrow layer"])
def test_a_codec_goes_all_the_way(kind, tmp_path):
    config, unet, original = config_of(kind.partition(" ")[0]), small_unet(), small_unet()
    layers = NARROW if "narrow" in kind else LAYERS
    config.low_rank = 2 if "branch" in kind else config.low_rank
    planned = small_unet()
    bits = planned_bits(planned, config, **layers)
    quantize(unet, config, layers)
    assert {layer.weight.scheme.codec for layer in quantized_layers(unet).values()} == (
        {"trellis", "gptq"} if "narrow" in kind else {config.kind}
    )
    branches = {getattr(layer.weight.scheme, "rank", 0) for layer in quantized_layers(unet).values()}
    assert branches == {config.low_rank}
    assert count_bits(unet).bytes == bits.bytes == count_bits(planned).bytes

    attach(torch.nn.Module.float(torch.nn.Module.half(unet)).eval().requires_grad_(False))
    unet.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size == checkpoint_size(unet).total
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert quantized_layers(loaded).keys() == quantized_layers(unet).keys()
    assert torch.equal(output(loaded), output(unet))
    error = float((output(loaded) - output(original)).square().mean())
    assert 0 < error < float(output(original).square().mean())

    losses = distilled(loaded, steps=8)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", CODECS)
def test_without_data_a_codec_quantizes_or_says_what_it_needs(kind):
    from vqdm.codecs.encode import quantize_without_data
    from vqdm.errors import UserError

    unet, config = small_unet(), config_of(kind)
    if CODECS[kind].data_free(config):
        quantize_without_data(unet, config, pattern=PATTERN)
        assert quantized_layers(unet)
    else:
        with pytest.raises(UserError, match=f"{kind} needs calibration data"):
            quantize_without_data(unet, config, pattern=PATTERN)


def test_what_is_put_in_place_empty_has_the_planned_layers():
    unet = small_unet()
    assignment = assign_schemes(unet, config_of("rtn"), **LAYERS)
    swap_empty(unet, assignment.quantized)
    assert list(quantized_layers(unet)) == [spec.name for spec in assignment.specs]
