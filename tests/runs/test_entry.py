"""Every command ends in one line for what the user can mend, and writes to any terminal."""

import io
import os
import sys
from pathlib import Path

import pytest

from vqdm.errors import UserError
from vqdm.runs.entry import prepare, run_script

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"


@pytest.mark.parametrize("error", [UserError("no such\nthing"), PermissionError(13, "Permission denied", "x")])
def test_a_script_ends_in_one_line(error):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert str(ended.value).startswith("error: ") and "\n" not in str(ended.value)


def test_a_bug_keeps_its_traceback_and_ctrl_c_its_exit_code():
    def bug():
        raise KeyError("a bug")

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyError):
        run_script(bug)
    with pytest.raises(SystemExit) as ended:
        run_script(interrupted)
    assert ended.value.code == 130
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: None)
    assert not ended.value.code


def test_a_broken_pipe_is_no_success_unless_it_is_that_of_stdout(monkeypatch):
    def broken():
        raise BrokenPipeError(32, "Broken pipe")

    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit, match=r"error: .*Broken pipe"):
            run_script(broken)
        os.close(read)
        with pytest.raises(SystemExit) as ended:
            run_script(broken)
        assert ended.value.code == 0
        print("goes nowhere", flush=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_any_encoding_takes_what_is_printed(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    prepare()
    print("1024² × 3 — ± 0.1 → 画", flush=True)
    assert b"1024" in raw.getvalue()


def test_every_script_ends_that_way_and_prepares_before_torch():
    for script in SCRIPTS.rglob("*.py"):
        text = script.read_text(encoding="utf-8")
        if "__main__" in text:
            assert text.endswith('if __name__ == "__main__":\n    run_script(main)\n'), script
            first = text.index("from vqdm.runs.command_line import run_script")
            late = (text.find(line) for line in ("\nimport torch", "\nfrom torch", "\nfrom vqdm.models"))
            assert all(place == -1 or place > first for place in late), script
