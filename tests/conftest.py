import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings

import vqdm  # noqa: F401  (before diffusers: the torchvision cure)

settings.register_profile("vqdm", deadline=None)  # a busy machine takes longer than 200 ms for an example
settings.load_profile("vqdm")
gc.disable()  # while torch and diffusers are imported: a fifth of the time

pytest_plugins = ["browser"]  # the fixture browser_page


def pytest_collection_finish(session):
    gc.freeze()  # what was imported stays; the collections of the tests pass it over
    gc.enable()
