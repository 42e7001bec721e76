"""The whole pipeline on a device that is none: every file `driven_*.py` beside this one, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
from fake_device import built, reason_to_skip
from tiny_world import ROOT, environment

HERE = Path(__file__).resolve().parent
QUICK = "driven_device.py"
SLOW = sorted(path.name for path in HERE.glob("driven_*.py") if path.name != QUICK)


def drive(name: str) -> None:
    if (reason := reason_to_skip()) is not None:
        pytest.skip(reason)
    built()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", str(HERE / name)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


def test_the_device_and_a_denoiser_on_it():
    drive(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_what_is_driven_through_it(name):
    drive(name)
