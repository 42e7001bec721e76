"""Outputs for the prompt's embedding are computed once per image, and never given where anything has changed."""

import copy
import gc
import weakref
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline
from random_weights import random_weight, trellis_weight
from torch import nn

import vqdm
from vqdm.codecs import rtn
from vqdm.hub.quantizer import attach
from vqdm.models.specs import layer_specs, spec_of, weight_to_matrix
from vqdm.seeds import torch_generator
from vqdm.weights.additive import AdditiveScheme
from vqdm.weights.layers import QuantizedLinear, quantized_layers, swap
from vqdm.weights.scalar import ScalarScheme

TINY = Path(vqdm.__file__).parent / "models" / "tiny"
WEIGHTS = {
    "trellis": lambda: trellis_weight(24, [8, 12, 9, 16], spare=2),
    "shared": lambda: random_weight(AdditiveScheme(num_codebooks=2, group_size=4, shared="codebooks"), (24, 4)),
    "scalar": lambda: random_weight(ScalarScheme(bits=3), (24, 4)),
}


class Counted(QuantizedLinear):
    """Counts its products."""

    products = 0

    def _product(self, inputs):
        self.products += 1
        return super()._product(inputs)


def counted(kind="scalar", name="blocks.0.attn2.to_k", decode="per_call"):
    weight = WEIGHTS[kind]().requires_grad_(False)
    spec = spec_of(name, nn.Linear(4, 24))
    return Counted(weight, nn.Parameter(torch.ones(24), requires_grad=False), spec, decode=decode)


def text(seed=0):
    return torch.randn(2, 5, 4, generator=torch_generator(seed, "text"))


def fresh(layer, inputs):
    """What a layer without a memory gives."""
    return nn.functional.linear(inputs, layer.decoded(inputs.dtype), layer.bias)


@torch.no_grad()
@pytest.mark.parametrize("decode", ["per_call", "cached"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_same_text_is_computed_once(kind, decode):
    layer, inputs = counted(kind, decode=decode), text()
    outputs = [layer(inputs) for _ in range(4)]
    assert layer.products == 1
    assert all(torch.equal(output, fresh(layer, inputs)) for output in outputs)
    other = text(1)
    assert torch.equal(layer(other), fresh(layer, other)) and layer.products == 2
    assert torch.equal(layer(inputs), outputs[0]) and layer.products == 3
    assert torch.equal(layer(inputs.clone()), outputs[0]) and layer.products == 4


@torch.no_grad()
@pytest.mark.parametrize("name", ["attn1.to_k", "blocks.0.attn2.to_q", "attn2.to_out.0", "conv_in"])
def test_other_layers_keep_nothing(name):
    layer, inputs = counted(name=name), text()
    assert layer(inputs) is not layer(inputs) and layer.products == 2


def refill(inputs, new):
    inputs.copy_(new)


def refill_a_view(inputs, new):
    inputs[1:].copy_(new[1:])


def refill_in_inference_mode(inputs, new):
    with torch.inference_mode():
        inputs.copy_(new)


def refill_by_index(inputs, new):
    inputs.detach()[:, 2] = new[:, 2]


@torch.no_grad()
@pytest.mark.parametrize("write", [refill, refill_a_view, refill_in_inference_mode, refill_by_index])
def test_a_text_that_was_written_to_is_computed_anew(write):
    layer, inputs = counted(), text()
    before = layer(inputs).clone()
    write(inputs, text(1))
    assert torch.equal(layer(inputs), fresh(layer, inputs))
    assert not torch.equal(layer(inputs), before)


@torch.no_grad()
def test_an_output_that_was_written_to_is_computed_anew():
    layer, inputs = counted(), text()
    layer(inputs).zero_()
    assert torch.equal(layer(inputs), fresh(layer, inputs))


CHANGES = {
    "scales": lambda layer: layer.weight.scales.mul_(2),
    "codes": lambda layer: layer.weight.codes.bitwise_xor_(1),
    "shared part": lambda layer: next(layer.weight.shared[0].parameters()).mul_(3),
    "bias": lambda layer: layer.bias.add_(1),
    "another bias": lambda layer: setattr(layer, "bias", nn.Parameter(layer.bias + 1)),
    "another scale": lambda layer: setattr(layer.weight, "scales", nn.Parameter(layer.weight.scales * 2)),
    "scale by data": lambda layer: setattr(layer.weight.scales, "data", layer.weight.scales.data * 2),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_made_by_other_parameters_is_not_given(change):
    layer, inputs = counted("shared"), text()
    before = layer(inputs).clone()
    CHANGES[change](layer)
    assert torch.equal(layer(inputs), fresh(layer, inputs))
    assert not torch.equal(layer(inputs), before)


@torch.no_grad()
def test_it_is_dropped_with_dtype_decode_mode_and_training():
    layer, inputs = counted(), text()
    layer(inputs)
    for products, change in enumerate(
        [lambda: setattr(layer, "decode", "cached"), layer.train, layer.eval, lambda: layer.to(torch.float32)], 2
    ):
        change()
        layer(inputs)
        layer(inputs)
        assert layer.products == products
    layer.double()
    assert layer(inputs.double()).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(inputs).dtype == torch.bfloat16
    assert layer(inputs).dtype == torch.float32


@torch.no_grad()
def test_memory_is_free_when_the_text_is_gone():
    layer, inputs = counted(), text()
    kept = weakref.ref(layer(inputs))
    assert kept() is not None
    gc.disable()  # no cycle may hold it
    try:
        del inputs
        assert kept() is None
        inputs = text()
        kept = weakref.ref(layer(inputs))
        del layer
        assert kept() is None
    finally:
        gc.enable()


def test_copies_remember_for_themselves():
    layer, inputs = counted(), text()
    with torch.no_grad():
        layer(inputs)
        copied = copy.deepcopy(layer)
        copied.weight.scales.mul_(2)
        assert torch.equal(copied(inputs), fresh(copied, inputs))
        copied(inputs)
        assert copied.products == 2 and layer(inputs) is layer(inputs)


def test_off_where_gradients_are_recorded_where_nothing_keeps_a_version_and_where_it_is_told():
    layer, inputs = counted(), text()
    layer(inputs), layer(inputs)
    assert layer.products == 2
    with torch.inference_mode():
        layer(inputs), layer(inputs), layer(text()), layer(inputs)
    assert layer.products == 6
    with torch.inference_mode():
        made = text()
    with torch.no_grad():
        layer(made), layer(made)
        assert layer.products == 8
        layer(inputs)
        layer.keeps_texts = False
        layer(inputs), layer(inputs)
    assert layer.products == 11


def test_off_in_a_compiled_graph():
    layer, inputs = counted(), text()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(inputs)
        inputs.data.add_(1)  # which no version tells
        assert torch.allclose(compiled(inputs), fresh(layer, inputs))
    torch._dynamo.reset()


@torch.no_grad()
def test_off_while_parameters_are_kept_elsewhere():
    layer, inputs = counted("trellis"), text()
    expected = fresh(layer, inputs)
    parts = accelerate.cpu_offload(nn.ModuleList([layer, *layer.weight.shared]), torch.device("cpu"))
    assert torch.equal(parts[0](inputs), expected) and torch.equal(parts[0](inputs), expected)
    assert layer.products == 2


@pytest.fixture(scope="module")
def pipeline():
    made = DiffusionPipeline.from_pretrained(TINY, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    unet = made.unet.requires_grad_(False)
    for spec in layer_specs(unet):
        swap(unet, spec, rtn.encode(weight_to_matrix(unet.get_submodule(spec.name).weight), bits=6))
    attach(unet)
    nn.Module.float(unet)
    return made


def image(pipeline, prompt="a large red circle", **options):
    options |= {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
    return pipeline(prompt, generator=torch_generator(0, "image"), **options).images


def texts_decoded(pipeline, monkeypatch) -> list[str]:
    """Names of layers, one for every time that their weight is decoded for a text."""
    decoded = []
    for name, layer in quantized_layers(pipeline.unet).items():
        if layer._texts is not None:
            monkeypatch.setattr(layer, "decoded", _spied(layer.decoded, name, decoded))
    return decoded


def _spied(function, name, names):
    def call(*arguments):
        names.append(name)
        return function(*arguments)

    return call


def test_images_are_the_same_and_keys_and_values_are_decoded_once_each(pipeline, monkeypatch):
    layers = quantized_layers(pipeline.unet)
    texts = [name for name, layer in layers.items() if layer._texts is not None]
    assert texts == [name for name in layers if name.endswith(("attn2.to_k", "attn2.to_v"))] != []
    decoded = texts_decoded(pipeline, monkeypatch)
    found = [image(pipeline, prompt) for prompt in ("a large red circle", "two small blue squares")]
    assert sorted(decoded) == sorted(2 * texts)
    assert all(layer._texts._kept is None for layer in layers.values() if layer._texts is not None)
    for name in texts:
        monkeypatch.setattr(layers[name], "keeps_texts", False)
    decoded.clear()
    plain = [image(pipeline, prompt) for prompt in ("a large red circle", "two small blue squares")]
    assert len(decoded) == 2 * 3 * len(texts)
    assert all((one == other).all() for one, other in zip(found, plain, strict=True))
    assert (found[0] != found[1]).any()


def test_adapters_that_change_between_and_within_images(pipeline):
    """A LoRA's own products are added outside of what is kept."""
    from peft import LoraConfig

    unet = copy.deepcopy(pipeline.unet)
    made = type(pipeline)(**{**pipeline.components, "unet": unet})
    made.set_progress_bar_config(disable=True)
    before = image(made)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["attn2.to_k", "attn2.to_v"]))

    def halve(_, step, timestep, tensors):
        unet.set_adapters(["default"], [0.5])
        return tensors

    found = [image(made), image(made, callback_on_step_end=halve)]
    for layer in quantized_layers(unet).values():
        layer.keeps_texts = False
    unet.set_adapters(["default"], [1.0])
    assert (found[0] == image(made)).all() and (found[1] == image(made, callback_on_step_end=halve)).all()
    assert (found[0] != found[1]).any() and (found[0] != before).any()
    unet.delete_adapters(["default"])
    for layer in quantized_layers(unet).values():
        layer.keeps_texts = True
    assert (image(made) == before).all()
