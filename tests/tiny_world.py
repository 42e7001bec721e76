"""How tests run the whole way: run.py as a user does, on a few prompts of the shipped tiny model."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "evaluate.prompts.n=16", "evaluate.batch_size=4", "evaluate.bootstrap=3", "calibration.n=4",
    "calibration.batch_size=2", "model.sampler.steps=4", "threads=1", "tracker=none",
)  # fmt: skip


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *arguments]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", **extra}


def run(*arguments: str, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess:
    """run.py to its end; stdout and stderr as text."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=300
    )
