"""Edits of concepts: the ridge against least squares, adapters against peft's and against decoded codes."""

import re

import edit_concept
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from quantized import quantized_unet
from tiny_world import FEW, run

from vqdm.config.options import ModelConfig
from vqdm.metrics.families import FAMILIES
from vqdm.metrics.probes.asked import Asked
from vqdm.metrics.probes.closed_form import (
    adapter,
    beside,
    changes_of_weights,
    factors,
    lora_layers,
    rank_with,
    reading_layers,
    ridge,
)
from vqdm.metrics.probes.concepts import Concepts, make_adapters, naming_old, renamed_in, without_old
from vqdm.models.loader import load_pipeline
from vqdm.models.shipped import builtin_directory, evaluators_directory
from vqdm.prompts import load_prompts
from vqdm.tiny.captions import requested
from vqdm.tiny.scenes import TINY, UNSEEN_PAIRS
from vqdm.weights.layers import quantized_layers

PROMPTS = load_prompts(source="tiny", split="test", n=200).prompts


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_captions_name_one_red_thing_or_none_and_no_pair_that_was_never_shown():
    for prompt in PROMPTS:
        red = naming_old(prompt.text, TINY)
        for text, colour in ((red, "red"), (renamed_in(red, "blue"), "blue")):
            things = requested(text).things
            assert not {(thing.shape, thing.colour) for thing in things} & UNSEEN_PAIRS
            assert colour in [thing.colour for thing in things]
        assert [thing.colour for thing in requested(red).things].count("red") == 1
        rest = requested(without_old(prompt.text, TINY))
        assert "red" not in [thing.colour for thing in rest.things]
        assert rest.pattern == requested(prompt.text).pattern  # "checkered" has red in it
    assert naming_old("an orange diamond above a red ring", TINY) == "a red circle above a white ring"


def test_the_ridge_is_the_least_squares_solution():
    """‖D x − (x* − x)‖² + ‖D k‖² + λ ‖D‖² as one system of rows, solved by torch.linalg.lstsq."""
    old, new, kept, penalty = drawn(3, 2, 5, seed=0), drawn(3, 2, 5, seed=1), drawn(4, 2, 5, seed=2), 0.3
    rows = torch.cat([old.reshape(-1, 5), kept.reshape(-1, 5), penalty**0.5 * torch.eye(5, dtype=torch.float64)])
    wanted = torch.cat([(new - old).reshape(-1, 5), torch.zeros(8 + 5, 5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(ridge(old, new, kept, penalty=penalty), expected)


def test_factors_keep_the_power_that_is_asked_and_no_rank_more():
    change = drawn(6, 6, seed=3)
    values = torch.linalg.svdvals(change).square()
    for rank in range(1, 7):
        share = float(values[:rank].sum() / values.sum())
        left, right = factors(change, power=share - 1e-9)
        assert left.shape == (6, rank) and right.shape == (rank, 6)
        assert float((change - left @ right).square().sum()) == pytest.approx(float(values[rank:].sum()), abs=1e-9)


@torch.no_grad()
def test_an_adapter_of_codes_is_the_decoded_weights_product():
    layers = [layer for layer in quantized_layers(quantized_unet("rtn")).values() if isinstance(layer, torch.nn.Linear)]
    layer = next(layer for layer in layers if layer.bias is not None)
    left, right = drawn(layer.in_features - 2, 3, seed=4), drawn(3, layer.in_features - 2, seed=5)
    _, down, up = adapter(layer, left, right)
    weight = layer.decoded(torch.float32)
    expected = torch.zeros_like(weight)
    expected[:, :-2] = (weight[:, :-2].double() @ left @ right).float()
    torch.testing.assert_close(up @ down, expected, rtol=1e-4, atol=1e-4)


WITH_TEXT = {  # a small U-Net that reads 16 pooled values beside sizes
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 16 + 6 * 4,
}


def conditioned_output(unet) -> torch.Tensor:
    conditions = {"text_embeds": drawn(1, 16, seed=8).float(), "time_ids": torch.ones(1, 6)}
    asked = (drawn(1, 4, 8, 8, seed=6).float(), 500, drawn(1, 5, 32, seed=7).float())
    return unet(*asked, added_cond_kwargs=conditions).sample


@torch.no_grad()
def test_a_file_of_full_rank_beside_codes_is_the_change_added_to_decoded_weights(tmp_path):
    """On a small U-Net in codes, through diffusers' own loader; half precision is the file's."""
    unet, plain = quantized_unet("rtn", **WITH_TEXT), quantized_unet("rtn", **WITH_TEXT).dequantize()
    of_tokens, of_pooled = drawn(32, 32, seed=4), drawn(16, 16, seed=5)
    changes = changes_of_weights(unet, of_tokens, of_pooled)
    assert changes.keys() == reading_layers(plain).keys() and len(changes) > 4
    rank = max(min(change.shape) for change in changes.values())
    before = conditioned_output(unet)
    layers = lora_layers(changes, rank=rank)
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    unet.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix="unet")
    for name, (layer, pooled) in reading_layers(plain).items():
        change = of_pooled if pooled else of_tokens
        layer.weight[:, : len(change)] += (layer.weight[:, : len(change)].double() @ change).float()
        assert changes[name].shape == layer.weight.shape
    torch.testing.assert_close(conditioned_output(unet), conditioned_output(plain), rtol=5e-3, atol=5e-3)
    assert (conditioned_output(unet) - before).abs().max() > 0.1


def test_the_rank_is_the_smallest_with_the_power_in_every_layer():
    first = torch.diag(torch.tensor([3.0, 1.0, 0.1])) @ torch.ones(3, 3).triu()
    second = torch.diag(torch.tensor([1.0, 1.0, 1.0]))
    assert rank_with({"a": first}, power=0.5) == 1
    assert rank_with({"a": first, "b": second}, power=0.5) == 2
    assert rank_with({"b": second}, power=0.99) == 3


@pytest.mark.slow
def test_a_written_edit_makes_red_blue_beside_the_pipeline(pipeline, tmp_path, capsys):
    edit_concept.main(["tiny", str(tmp_path / "edit")])
    said = capsys.readouterr().out
    assert re.search(r"rank (\d+), 15 layers; bits per weight of the U-Net 16\.00 \+ 0\.\d+$", said.strip()), said
    prompts = [[prompt.id, prompt.text] for prompt in PROMPTS[:8]]
    probe = Concepts(pipeline, TINY, evaluators_directory(None), guidance=3.0)
    probe.adapters = []
    unedited = probe.unedited(prompts)
    pipeline.load_lora_weights(tmp_path / "edit", weight_name="pytorch_lora_weights.safetensors")
    found = probe.edited(prompts, unedited)
    pipeline.unload_lora_weights()
    assert float(found["concept_hit"].mean()) >= 0.75 and float(found["concept_rest"].mean()) >= 0.75
    with pytest.raises(SystemExit, match="exists already"):
        edit_concept.main(["tiny", str(tmp_path / "edit")])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"caption": "a red ring"}', "holds no edit; add lines with as"),
        ('{"caption": "a red ring", "as": "a blue ring"}', "holds no caption to keep; add lines without as"),
        ('{"caption": "a red ring", "as": 3}', "line 1: as is no text"),
        ('{"caption": "a", "as": "b", "to": "c"}', "line 1: unknown key 'to'"),
    ],
)
def test_a_bad_file_of_captions_is_one_line(lines, said, tmp_path, capsys):
    (tmp_path / "edit.jsonl").write_text(lines + "\n")
    with pytest.raises(SystemExit) as error:
        edit_concept.main(["tiny", str(tmp_path / "out"), "--captions", str(tmp_path / "edit.jsonl")])
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(ModelConfig(builtin="tiny"), device="cpu")


@torch.no_grad()
def test_beside_the_weights_it_is_pefts_lora_and_afterwards_it_is_gone(pipeline):
    adapters = make_adapters(Asked(pipeline, "concepts"), TINY)
    names = {module: name for name, module in pipeline.unet.named_modules()}
    unet = UNet2DConditionModel.from_pretrained(builtin_directory("tiny") / "unet")
    ranks = {names[layer]: len(down) for layer, down, _ in adapters}
    unet.add_adapter(LoraConfig(r=1, lora_alpha=1, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks))
    for layer, down, up in adapters:
        lora = unet.get_submodule(names[layer])
        lora.lora_A["default"].weight.copy_(down)
        lora.lora_B["default"].weight.copy_(up)
    asked = (drawn(1, 4, 8, 8, seed=6).float(), 500, drawn(1, 24, 192, seed=7).float())
    conditions = {"text_embeds": drawn(1, 128, seed=8).float(), "time_ids": torch.ones(1, 6)}
    plain = pipeline.unet(*asked, added_cond_kwargs=conditions).sample
    with beside(adapters):
        found = pipeline.unet(*asked, added_cond_kwargs=conditions).sample
    torch.testing.assert_close(found, unet(*asked, added_cond_kwargs=conditions).sample, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)
    assert torch.equal(pipeline.unet(*asked, added_cond_kwargs=conditions).sample, plain)


def test_tiny_shows_blue_for_red_and_keeps_the_rest(pipeline):
    probe = Concepts(pipeline, TINY, evaluators_directory(None), guidance=3.0)
    found = probe.columns([[prompt.id, prompt.text] for prompt in PROMPTS[:8]])
    assert set(found) == set(FAMILIES["concepts"].metrics)
    assert all(column.shape == (8,) and column.isfinite().all() for column in found.values())
    assert float(found["concept_said"].mean()) >= 0.75
    assert float(found["concept_hit"].mean()) >= 0.75 and float(found["concept_rest"].mean()) >= 0.75
    assert float(found["concept_rest_psnr"].mean()) >= 30
    probe.adapters = []
    assert float(probe.columns([[PROMPTS[0].id, PROMPTS[0].text]])["concept_hit"]) == 0


@pytest.mark.slow
def test_a_run_has_concepts_among_its_scores(tmp_path):
    scores = "evaluate.metrics=[concepts]"
    done = run("+experiment=tiny_codec", "quantize=rtn4", scores, f"results_dir={tmp_path}", *FEW)
    assert done.returncode == 0, done.stderr
    assert "concept" in done.stdout
