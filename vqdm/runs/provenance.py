"""What made an artifact: git commit, library versions and processor, found without importing any of the libraries."""

import contextlib
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
LIBRARIES = ("vqdm", "torch", "diffusers", "transformers", "numpy")


def provenance() -> dict:
    """What a manifest keeps of code, libraries and machine: git_sha, dirty, versions and processor."""
    return git_state() | {"versions": versions(), "processor": processor()}


@cache
def git_state() -> dict:
    """{"git_sha", "dirty"} of the checkout this package runs from; both None where it is not a checkout.

    Looks for .git right there: an installed package must not report the repository its environment lies in.
    """
    if not (CHECKOUT / ".git").exists():
        return {"git_sha": None, "dirty": None}
    changes = _git("status", "--porcelain")
    return {"git_sha": _git("rev-parse", "--verify", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    """A git command's output, or None where git is absent, slow or has nothing to say (no commit yet)."""
    command = ["git", "-C", str(CHECKOUT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache
def versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {name: installed_version(name) for name in LIBRARIES}


@cache
def processor() -> str:
    """The processor's name, as its maker gives it: kernels, and so last digits, differ from one to another."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed_version(library: str) -> str | None:
    """The version of an installed package; None if there is none."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
