"""How tests run the whole way: run.py as a user does, on a few prompts of the shipped tiny model.

`run` executes run.py inside this process, where everything is imported already: a quarter of the time. `run_process`
starts a process of its own: where signals, exit codes, limits, or what is read while importing is what is tested.
"""

import contextlib
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "evaluate.prompts.n=16", "evaluate.batch_size=4", "evaluate.bootstrap=3", "calibration.n=4",
    "calibration.batch_size=2", "model.sampler.steps=4", "threads=1", "tracker=none",
)  # fmt: skip
FEW = (*SMALL, r"model.layers='(up_blocks\.0\.resnets\.0\.conv1|mid_block.*to_q)$'")  # of the denoiser's 118 layers, 3
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)  # run.py sets their handlers


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *arguments]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", **extra}


def run_process(*arguments: str, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess:
    """run.py to its end in a process of its own; stdout and stderr as text."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=600
    )


def run(*arguments: str, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess:
    """run.py to its end in this process, with exit code, stdout and stderr as `run_process` gives them."""
    return run_script("run.py", *arguments, cwd=cwd, **extra)


def run_script(script: str, *arguments: str, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess:
    """A script of the repository as `__main__` inside this process; what it leaves of global state is taken back.

    script: relative to the repository. extra: environment variables; what libraries read while they are imported
    (HF_HOME) comes too late.
    """
    out, err, path = io.StringIO(), io.StringIO(), str(ROOT / script)
    with (
        contextlib.ExitStack() as stack,
        mock.patch.object(sys, "argv", [path, *arguments]),
        mock.patch.dict(os.environ, environment(**extra)),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        for keep in (_warnings, _logging, _signals, _threads, _hydra):
            stack.enter_context(keep())
        code = _exit_code(path)
    return subprocess.CompletedProcess([path, *arguments], code, out.getvalue(), err.getvalue())


def _exit_code(path: str) -> int:
    """What Python would end with, having said the same."""
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@contextlib.contextmanager
def _warnings():
    """Warnings go to stderr with Python's own filters, not to pytest's list."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for action, category in (
            ("ignore", ResourceWarning), ("ignore", ImportWarning), ("ignore", PendingDeprecationWarning),
            ("ignore", DeprecationWarning),
        ):  # fmt: skip
            warnings.simplefilter(action, category)
        warnings.showwarning = lambda *about, file=None, line=None: sys.stderr.write(
            warnings.formatwarning(*about[:4], line)
        )
        yield


@contextlib.contextmanager
def _logging():
    """The root logger without pytest's handlers, so that run.py adds its own, to the stderr of now."""
    loggers = [logging.getLogger(), logging.getLogger("vqdm")]
    before = [(logger.handlers[:], logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers[:] = []
    try:
        yield
    finally:
        for logger, (handlers, level) in zip(loggers, before, strict=True):
            logger.handlers[:] = handlers
            logger.setLevel(level)


@contextlib.contextmanager
def _signals():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _threads():
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _hydra():
    """Hydra holds one configuration per process."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton

    from vqdm.config.compose import NamedSweep

    before = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        Singleton.set_state(before)
        NamedSweep.directory = None
