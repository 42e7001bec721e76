"""Places of a pipeline's parts: the denoiser lies on the device, and the others visit it while they compute.

SDXL's text encoders and VAE take 1.8 GB in 16 bit, which the denoiser's activations, or Hessians, need meanwhile.
"""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import cpu_offload_with_hook
from torch import nn

from vqdm.models.parts import DENOISERS


def put_on(pipeline, device: str):
    """Put a pipeline on a device; on another than the CPU only its denoiser stays there."""
    if torch.device(device).type == "cpu":
        return pipeline.to(device)
    for name, part in _modules(pipeline).items():
        if name in DENOISERS:
            part.to(device)
        else:
            cpu_offload_with_hook(part, torch.device(device))  # it comes when it is called; we let it go
    return pipeline


@contextlib.contextmanager
def visits(pipeline) -> Iterator[None]:
    """Context in which the parts that visit the device leave it before the denoiser runs, and at the end."""
    modules = _modules(pipeline)
    visitors = [part for part in modules.values() if hasattr(part, "_hf_hook")]

    def leave(*_) -> None:
        for part in visitors:
            if next(part.parameters()).device.type != "cpu":
                part.to("cpu")

    hooks = [modules[name].register_forward_pre_hook(leave) for name in DENOISERS if visitors and name in modules]
    try:
        yield
    finally:
        leave()
        for hook in hooks:
            hook.remove()


def _modules(pipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
