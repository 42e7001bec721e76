import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import vqdm  # noqa: F401  (before diffusers: the torchvision cure)

pytest_plugins = ["browser"]  # the fixture browser_page
