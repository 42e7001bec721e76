"""Text encoders and VAE at few bits: written as foretold, loaded by the libraries alone, and the same when sampled."""

import json
import subprocess
import sys

import pytest
import torch
from composed import compose
from diffusers import AutoencoderKL
from tiny_world import FEW, ROOT, environment, run
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from vqdm.codecs.allocation import assign_part, planned_bits
from vqdm.codecs.encode import matrix_of
from vqdm.codecs.rtn import encode
from vqdm.config.codecs import RtnConfig, TrellisConfig
from vqdm.config.options import ModelConfig, SamplerConfig
from vqdm.config.parts import PartsConfig
from vqdm.errors import UserError
from vqdm.hub.checkpoint import checkpoint_size
from vqdm.hub.parts import load_part, save_part
from vqdm.models.loader import denoiser_on_meta, load_pipeline
from vqdm.models.location import configs_directory
from vqdm.models.single_file import component_on_meta
from vqdm.models.specs import layer_specs
from vqdm.prompts import load_prompts
from vqdm.stages.parts import quantize_parts
from vqdm.stages.plan.parts import plan_parts
from vqdm.weights.layers import QuantizedEmbedding, swap, swap_empty

MODEL = ROOT / "vqdm" / "models" / "tiny"
KINDS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection, "vae": AutoencoderKL}


def loaded(part: str):
    return KINDS[part].from_pretrained(MODEL / part, dtype=torch.float32).requires_grad_(False)


def quantized(part: str):
    """A part by rounding: matrices to 4 bits, token embeddings to 8."""
    module = loaded(part)
    for spec in layer_specs(module):
        swap(module, spec, encode(matrix_of(module, spec), bits=8 if spec.kind == "embedding" else 4, layer=spec.name))
    return module


def output(part: str, module):
    generator = torch.Generator().manual_seed(0)
    if part == "vae":
        return module.decode(torch.randn(2, module.config.latent_channels, 8, 8, generator=generator)).sample
    return module(torch.randint(0, 600, (3, 24), generator=generator), output_hidden_states=True).hidden_states[-2]


@pytest.mark.parametrize("part", KINDS)
def test_a_part_is_saved_in_the_bytes_foretold_and_loads_as_the_same_numbers(part, tmp_path):
    module, planned = quantized(part), loaded(part).to("meta")
    swap_empty(planned, [(spec, module.get_submodule(spec.name).weight.scheme) for spec in layer_specs(planned)])
    written = save_part(module, tmp_path / part)
    assert written == checkpoint_size(planned).total
    module = torch.nn.Module.to(module, dtype=torch.float32)  # scales, too: they were as they are stored
    found = load_part(tmp_path / part, dtype=torch.float32)
    assert torch.equal(output(part, found), output(part, module))
    alone = KINDS[part].from_pretrained(tmp_path / part, dtype=torch.float32)
    assert torch.equal(output(part, alone), output(part, module))


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("width", [16, 24, 20])
def test_an_embedding_decodes_the_rows_that_are_read(bits, width):
    table = torch.nn.Embedding(50, width).requires_grad_(False)
    model = torch.nn.ModuleDict({"token_embedding": table})
    (spec,) = layer_specs(model, pattern="token_embedding$")
    weight = encode(matrix_of(model, spec), bits=bits).float()
    layer = swap(model, spec, weight)
    tokens = torch.tensor([[0, 49, 7], [7, 7, 3]])
    assert isinstance(layer, QuantizedEmbedding) and layer(tokens).shape == (2, 3, width)
    assert torch.equal(layer(tokens), weight()[tokens])
    assert torch.equal(layer.dequantized()(tokens), weight()[tokens])


def test_embeddings_get_bits_of_their_own_and_norms_none():
    assignment = assign_part(loaded("text_encoder_2"), TrellisConfig(bits=3), embeddings=8)
    schemes = {spec.name.rpartition(".")[2]: scheme for spec, scheme in assignment.quantized}
    assert schemes["token_embedding"].name == "rtn8"
    assert {"q_proj", "fc1", "fc2", "text_projection"} <= set(schemes) and "position_embedding" not in schemes
    assert schemes["fc1"].codec == "trellis"
    assert assign_part(loaded("vae"), RtnConfig(bits=8), embeddings=8).quantized


def test_a_damaged_text_encoder_is_refused(tmp_path):
    save_part(quantized("text_encoder"), tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="is not as it was saved"):
        load_part(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_encoders": "trellis99"}, "parts.text_encoders: quantize.bits"),
        ({"vae": "llama"}, "parts.vae: 'llama' is no scheme"),
        ({"vae": "adaround4"}, "parts.vae=adaround4: block reconstruction is for denoisers"),
    ],
)
def test_schemes_that_make_no_sense_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        PartsConfig(**options).codecs()


def test_the_plan_foretells_every_part_s_bytes():
    """SDXL's whole pipeline, 6.9 GB in 16 bit, stays within 1.5 GB; no weights are needed to say so."""
    config = compose("+experiment=sdxl_trellis3", "parts=small")
    directory = configs_directory(config.model)
    sizes = plan_parts(config, {part: component_on_meta(directory / part) for part in KINDS})
    denoiser = planned_bits(denoiser_on_meta(config.model), config.quantize, pattern=None, min_size=16).bytes
    assert sum(size.original for size in sizes.values()) > 1.8e9
    assert denoiser + sum(size.bytes for size in sizes.values()) < 1.5e9
    assert [size.scheme for size in sizes.values()] == ["trellis3", "trellis3", "rtn8"]


def test_parts_are_made_from_captions_and_latents_and_a_second_run_makes_nothing(tmp_path):
    config = ModelConfig(builtin="tiny", sampler=SamplerConfig(steps=1))
    prompts = load_prompts(source="tiny", n=3)
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "prompts.jsonl").write_bytes(prompts.to_jsonl())
    made = []
    for _ in range(2):
        made.append(
            quantize_parts(
                tmp_path / "parts",
                load_pipeline(config, device="cpu"),
                tmp_path / "calibration",
                config=PartsConfig(text_encoders="gptq4", vae="gptq8", images=1),
                sampler=config.sampler,
                noise_seed=0,
            )
        )
    assert made[0] == made[1] and set(made[0]["parts"]) == set(KINDS)
    for part, found in made[0]["parts"].items():
        assert found["file_bytes"] == sum(
            file.stat().st_size for file in (tmp_path / "parts" / part).glob("*.safetensors")
        )


@pytest.mark.slow
def test_a_pipeline_small_in_all_parts_loads_by_diffusers_alone(tmp_path):
    options = ("quantize=rtn4", "parts=small", "parts.images=2", f"results_dir={tmp_path}", *FEW)
    done = run("+experiment=compress", "model=tiny", f"output={tmp_path / 'small'}", *options)
    assert done.returncode == 0, done.stderr
    code = (
        "import sys, torch, vqdm; from diffusers import DiffusionPipeline; "
        "p = DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32); "
        "print(p('a red circle', num_inference_steps=2, height=32, width=32).images[0].size)"
    )
    sampled = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "small")],
        env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.strip() == "(32, 32)"
    for part in KINDS:
        config = json.loads((tmp_path / "small" / part / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "vqdm"
