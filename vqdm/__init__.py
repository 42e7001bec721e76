"""VQDM: vector quantization of text-to-image diffusion models. Importing it costs nothing and imports no torch.

import vqdm                                            # then from_pretrained loads what vqdm has saved
vqdm.compress(pipeline, "trellis3", prompts)           # quantizes a diffusers pipeline's denoiser in place
vqdm.enable_cache(pipeline)                            # reuses a U-Net's features between its calls; disable_cache
vqdm.VQDMConfig("trellis3")                            # a quantization_config for from_pretrained, without data
vqdm.hub.pipelines.set_decode(pipeline.unet, "cached") # keeps the weights decoded: faster, with more memory
"""

import importlib

from vqdm._imports import wait_for_imports

__version__ = "0.2.0"
_PUBLIC = {
    "VQDMConfig": "vqdm.hub.config",
    "compress": "vqdm.api",
    "disable_cache": "vqdm.acceleration.caching",
    "enable_cache": "vqdm.acceleration.caching",
}

wait_for_imports()


def __getattr__(name: str):
    if name == "hub":
        return importlib.import_module("vqdm.hub")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vqdm' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, "hub"})
