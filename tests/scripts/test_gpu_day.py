"""The day a GPU is there, rehearsed without one: what steps leave, what is done again, and every step's commands."""

import json

import gpu_day
import pytest
import torch

from vqdm.errors import UserError

WRITE = "-c 'import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])' {out} '[5]'"
PLACE = "gpu_day/rehearsal"


def use(monkeypatch, **commands):
    made = [gpu_day.Step(name, (), command, gpu_day.read_json) for name, command in commands.items()]
    monkeypatch.setattr(gpu_day, "STEPS", made)


def rehearse(folder, *options):
    code = gpu_day.main(["--rehearse", f"--results={folder}", *options])
    return code, {found["step"]: found for found in json.loads((folder / PLACE / "gpu_rehearsal.json").read_text())}


def test_every_step_leaves_its_answer_whatever_became_of_it(tmp_path, monkeypatch):
    use(
        monkeypatch,
        good=(WRITE,),
        bad=(WRITE, "-c 'raise SystemExit(\"no such kernel\")'"),
        slow=("-c 'while 1: pass'",),
    )
    monkeypatch.setattr(gpu_day, "LIMIT", 2)
    code, found = rehearse(tmp_path)
    assert code == 1
    assert [found[name]["outcome"].split()[0] for name in ("good", "bad", "slow")] == ["done", "failed", "out"]
    assert found["good"]["result"] == [5] and found["bad"]["result"] == [5] and found["slow"]["result"] is None
    assert found["bad"]["said"] == "no such kernel\n"
    assert found["good"]["device"] == "rehearsal" and found["good"]["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(found)
    page = (tmp_path / PLACE / "gpu_rehearsal.md").read_text()
    assert all(f"## {name}" in page for name in found)


def test_what_is_done_is_not_run_again(tmp_path, monkeypatch):
    use(monkeypatch, first=(WRITE,), second=("-c 'raise SystemExit(3)'",))
    assert rehearse(tmp_path)[0] == 1
    use(monkeypatch, first=("-c 'raise SystemExit(3)'",), second=(WRITE.replace("5", "6"),))
    code, found = rehearse(tmp_path)
    assert code == 0 and [found[name]["result"] for name in ("first", "second")] == [[5], [6]]
    assert rehearse(tmp_path, "--again", "--steps=first")[0] == 1


def test_without_a_gpu_there_is_only_a_rehearsal(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no GPU"):
        gpu_day.main([f"--results={tmp_path}"])
    with pytest.raises(UserError, match="no step is decode; there are tests"):
        gpu_day.main(["--rehearse", "--steps=decode", f"--results={tmp_path}"])


def test_the_gpus_tests_are_counted_and_say_why_they_were_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "STEPS", gpu_day.STEPS[:1])
    code, found = rehearse(tmp_path)
    result = found["tests"]["result"]
    assert code == 0 and result["tests"] > 10 and result["failures"] == result["errors"] == 0
    if not torch.cuda.is_available():
        assert result["skipped"] == result["tests"] and result["said"] == [f"torch {torch.__version__} sees no GPU"]


@pytest.mark.slow
def test_every_step_runs(tmp_path):
    code, found = rehearse(tmp_path)
    assert code == 0 and {record["outcome"] for record in found.values()} == {"done"}, found
    stages = {row["stage"]: row for row in found["sdxl_random"]["result"]}
    names = ["calibrate", "quantize", "tune_blocks", "trajectories", "finetune", "teacher_images", "images", "evaluate"]
    assert list(stages) == names and all(row["measured"] > 0 for row in stages.values())
