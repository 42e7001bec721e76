"""Every random draw names its generator: (seed, purpose, item). Nothing uses the global state."""

import contextlib
import hashlib

import numpy as np


def derive(seed: int, purpose: str, item: int | str = 0) -> int:
    """A 63-bit seed that depends on all three arguments and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{item}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def numpy_generator(seed: int, purpose: str, item: int | str = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(derive(seed, purpose, item)))


def torch_generator(seed: int, purpose: str, item: int | str = 0):
    """A CPU generator: noise is drawn on the CPU and moved, so it is the same on every device."""
    import torch

    return torch.Generator("cpu").manual_seed(derive(seed, purpose, item))


@contextlib.contextmanager
def seeded_initialisation(seed: int, purpose: str):
    """Seed torch's global generator inside and restore it after: libraries initialise modules from it."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, purpose, "initialisation"))
        yield
