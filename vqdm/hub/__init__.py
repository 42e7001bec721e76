"""Quantized models as diffusers loads and saves them; each module is imported when it is first named."""

import importlib
import pkgutil


def __getattr__(name: str):
    if name not in {module.name for module in pkgutil.iter_modules(__path__)}:
        raise AttributeError(f"module 'vqdm.hub' has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
