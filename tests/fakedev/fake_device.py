"""A device on the host's memory, called `fakedev`, for tests: what differs from the CPU is what would on a GPU.

A process registers it before its first backward pass, when torch starts a thread for each device, and keeps it. So what
is driven through it runs in processes of its own: `driven_*.py`, started by `test_fake_device.py`.
"""

import hashlib
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

import torch
from filelock import FileLock

NAME = "fakedev"
SOURCE = Path(__file__).with_name("fakedev.cpp")
CACHE = Path(__file__).resolve().parents[2] / ".pytest_cache" / "d"  # git does not see it


def reason_to_skip() -> str | None:
    """Why the extension cannot be built here; None if it can."""
    if shutil.which("c++") is None:
        return "no C++ compiler (c++) to build the fake device with"
    return None if _ninja() else "no ninja to build the fake device with"


def _ninja() -> bool:
    from torch.utils.cpp_extension import is_ninja_available

    beside = str(Path(sys.executable).parent)  # pip's ninja, of an environment that may not be activated
    if beside not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] += os.pathsep + beside
    return is_ninja_available()


def built() -> Path:
    """The extension for this torch and Python, compiled once: some 11 seconds of CPU."""
    from torch.utils.cpp_extension import load

    told = SOURCE.read_bytes() + f"{torch.__version__} {sys.version}".encode()
    library = CACHE / f"fakedev-{hashlib.sha256(told).hexdigest()[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            _ninja()
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                options = {"extra_cflags": ["-O1", "-g0"], "is_python_module": False, "is_standalone": False}
                load(NAME, [str(SOURCE)], build_directory=folder, **options)
                Path(folder, f"{NAME}.so").replace(library)
    return library


def register() -> None:
    """Make torch know the device."""
    torch.ops.load_library(built())
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()


def _module() -> types.ModuleType:
    """What torch and accelerate ask for under `torch.fakedev`."""
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module.synchronize = lambda device=None: None
    module.empty_cache = lambda: None
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.memory_allocated = lambda device=None: counts()["held"]
    module.max_memory_allocated = lambda device=None: counts()["peak"]
    module.get_device_properties = lambda device=None: types.SimpleNamespace(total_memory=8 << 30)
    module.mem_get_info = lambda device=None: (8 << 30, 8 << 30)
    return module


def reset() -> None:
    """Set what is counted to zero, and the peak of memory to what is held now."""
    torch.ops.fakedev.reset()


def counts() -> dict[str, int]:
    """Op calls, syncs, uploads, bytes read and written since the last reset; bytes held now and at the most."""
    return dict(torch.ops.fakedev.counts())


def calls() -> dict[str, int]:
    """Op calls by name."""
    return dict(torch.ops.fakedev.calls())


def syncs() -> dict[str, int]:
    """Op calls that a GPU would wait for, by name."""
    return dict(torch.ops.fakedev.syncs())
