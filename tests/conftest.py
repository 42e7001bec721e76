import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings

import vqdm  # noqa: F401  (before diffusers: the torchvision cure)

settings.register_profile("vqdm", deadline=None)  # a busy machine takes longer than 200 ms for an example
settings.load_profile("vqdm")

pytest_plugins = ["browser"]  # the fixture browser_page
