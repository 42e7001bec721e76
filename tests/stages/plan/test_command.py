"""What plan=true says of images that are partly there, and when a run on the CPU has to be asked for."""

import dataclasses
import json

import pytest
import torch
from composed import compose

from vqdm.config.checks import check
from vqdm.errors import UserError
from vqdm.runs.items import write_item
from vqdm.runs.store import Store
from vqdm.stages.graph.experiment import build_stages
from vqdm.stages.plan import command
from vqdm.stages.plan.command import images_made, print_plan, say_before_work, warn_of_emulated_bfloat16


def test_a_shorter_lists_last_batch_does_not_count_as_full(tmp_path):
    write_item(tmp_path, "000000", {}, {"prompts": [["a", "text"]] * 4})
    write_item(tmp_path, "000004", {}, {"rows": 2})
    assert [images_made(tmp_path, count, batch_size=4) for count in (3, 4, 6, 8, 12)] == [3, 4, 6, 6, 6]


def test_a_damaged_batch_does_not_count(tmp_path):
    write_item(tmp_path, "000000", {}, {"rows": 4})
    sidecar = tmp_path / "items" / "000000.json"
    whole = sidecar.read_text()
    for damaged in (json.dumps({"record": {}})[:5], whole.replace('"rows": 4', '"rows": 3')):
        sidecar.write_text(damaged)
        assert damaged != whole and images_made(tmp_path, 4, batch_size=4) == 0


@pytest.mark.parametrize(
    "own", ["cache=deepcache2", "cache=cachequant3", "activations=a8", "activations=dgq6", "prune=ld30"]
)
def test_accelerated_full_precision_is_planned(tmp_path, capsys, own):
    config = compose("+experiment=tiny_fp", own, "evaluate.prompts.n=3")
    plan = print_plan(config, Store(tmp_path), every_layer=False)
    assert plan.work and "work of an image: " in capsys.readouterr().out


def test_days_on_a_cpu_have_to_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, store = compose("+experiment=tiny_rtn4"), Store(tmp_path)
    stages = build_stages(config, cache=store.hashes)
    say_before_work(config, store, stages)  # small
    monkeypatch.setattr(command, "LARGE", 1_000_000)
    say_before_work(config, store, stages)  # and short
    monkeypatch.setattr(command, "LONG", 1)
    with pytest.raises(UserError, match=r"sees no GPU, and a denoiser of 4 M parameters takes .*device=cpu") as error:
        say_before_work(config, store, stages)
    assert "\n" not in str(error.value)
    say_before_work(dataclasses.replace(config, device="cpu"), store, stages)
    write_item(store.directory(stages.quantization.calibrate), "000000", {}, {})  # begun before: it goes on
    say_before_work(config, store, stages)


def test_a_gpu_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "LARGE", 1)
    monkeypatch.setattr(command, "LONG", 0)
    config, store = compose("+experiment=tiny_rtn4"), Store(tmp_path)
    say_before_work(config, store, build_stages(config, cache=store.hashes))


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"plan_for": "v100", "plan": True}, "a100, 4090, h100, h200"),
        ({"plan_for": "h100"}, "plan=true"),
        ({"plan_for": "h100", "plan": True, "device": "cpu"}, "device=cpu"),
    ],
)
def test_cards_to_plan_for(own, said):
    config = compose("+experiment=tiny_rtn4")
    with pytest.raises(UserError, match=said):
        check(dataclasses.replace(config, **own))
    check(dataclasses.replace(config, plan_for="h100", plan=True, device="cuda"))


def test_training_blocks_says_what_it_takes_before_any_work(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(command, "LARGE", 1_000_000)
    store = Store(tmp_path)
    for quantizer, lines in (("quantize=adaround", 1), ("quantize=rtn4", 0)):
        config = dataclasses.replace(compose("+experiment=tiny_codec", *quantizer.split()), device="cpu")
        caplog.clear()
        with caplog.at_level("INFO", logger="vqdm"):
            say_before_work(config, store, build_stages(config, cache=store.hashes))
        said = [record.getMessage() for record in caplog.records if "before any work" in record.getMessage()]
        assert len(said) == lines and all("36 blocks, 2,000 steps of 16 rows each" in line for line in said)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["finetune=paper"], ["finetune"]),
        (["finetune=paper", "finetune.steps=0"], []),
        (["finetune=both"], []),  # in float32
        (["few_step=dmd", "finetune=paper"], ["few_step", "finetune"]),
        (["few_step=dmd", "few_step.precision=float32"], []),
    ],
)
def test_training_in_a_precision_that_is_emulated_is_told(monkeypatch, caplog, options, named):
    config = compose("+experiment=tiny_codec", "quantize=rtn4", *options)
    for kernels, at, expected in ((False, "cpu", named), (False, "cuda", []), (True, "cpu", [])):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda kernels=kernels: kernels)
        caplog.clear()
        with caplog.at_level("WARNING", logger="vqdm"):
            warn_of_emulated_bfloat16([config, config], at)
        assert [message.partition(".")[0] for message in caplog.messages] == expected
