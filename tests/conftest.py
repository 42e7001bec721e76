import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
from hypothesis import settings

import vqdm  # noqa: F401  (before diffusers: the torchvision cure)

settings.register_profile("vqdm", deadline=None)  # a busy machine takes longer than 200 ms for an example
settings.load_profile("vqdm")

pytest_plugins = ["browser"]  # the fixture browser_page

CODECS = Path(__file__).parent / "codecs"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keeps a file's tests in one worker, as they share fixtures, and the codecs', whose loops numba compiles once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            together = CODECS if item.path.is_relative_to(CODECS) else item.path
            item.add_marker(pytest.mark.xdist_group(together.name))
