"""Refuse NaN, infinite and too large numbers where they enter, by the name of the tensor that has them.

After a computation nobody can tell them any more: an image of NaN is cast to black, and a black image has a score.
"""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vqdm.errors import UserError
from vqdm.models.specs import LayerSpec

LARGEST_STORED = torch.finfo(torch.float16).max  # of checkpoints' floats: 65504


def fault_of(tensor: Tensor) -> str | None:
    """The word for what no number of a model may be, NaN or infinite; None for a finite tensor, integers included."""
    extremes = _extremes(tensor)
    if extremes is None:
        return None
    low, high = extremes
    if bool(torch.isnan(low)):
        return "NaN"
    return "infinite" if bool(torch.isinf(low) | torch.isinf(high)) else None


def is_storable(tensor: Tensor) -> bool:
    """True if fp16 can hold every number of a tensor, rounded."""
    extremes = _extremes(tensor)
    return extremes is None or bool((extremes[0] >= -LARGEST_STORED) & (extremes[1] <= LARGEST_STORED))


def _extremes(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """The least and the largest number, both NaN where there is one; None for integers and for what holds none.

    One pass without a mask as large as the tensor, which isfinite makes.
    """
    if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return None
    if tensor.dtype.itemsize == 1:  # floats of eight bits have few operations
        tensor = tensor.to(torch.float32)
    return torch.aminmax(tensor.detach())


def check_finite(pipeline, place: Path | str, *, checked: Container[str] = ()) -> None:
    """UserError, naming the tensor, for a NaN or infinite weight of any part: text encoders, VAE and denoiser.

    checked: parts whose own loading has looked already; other libraries' tensors cannot always be looked at.
    """
    for part, module in pipeline.components.items():
        weights = module.state_dict() if isinstance(module, nn.Module) and part not in checked else {}
        for name, tensor in weights.items():
            if (fault := fault_of(tensor)) is not None:
                why = "the file is damaged or was saved from a training that diverged; get it again"
                if fault == "infinite" and tensor.dtype == torch.float16:
                    why = f"in float16, which holds none beyond {LARGEST_STORED:.0f}; give model.dtype=bfloat16"
                raise UserError(f"{place}: the weight {name} of the {part} has {fault} numbers: {why}")


def check_storable(denoiser: nn.Module, specs: list[LayerSpec]) -> None:
    """UserError, naming the tensor, for weights that a compressed model in 16 bit could not hold; before calibration.

    specs: the layers to be quantized, whose scales are fp16 whatever the model's dtype; the rest may be bfloat16.
    """
    quantized = {f"{spec.name}.weight" for spec in specs}
    for name, tensor in denoiser.state_dict().items():
        if (fault := fault_of(tensor)) is not None:
            raise UserError(f"the weight {name} of the denoiser has {fault} numbers: get the model again")
        if (name in quantized or tensor.dtype == torch.float32) and not is_storable(tensor):
            cure = (
                f"leave {name.removesuffix('.weight')} out of the layers to quantize"
                if name in quantized
                else "load the model in bfloat16"
            )
            raise UserError(f"the weight {name} of the denoiser has numbers beyond fp16's {LARGEST_STORED:.0f}: {cure}")


def check_call(call: Mapping[str, Tensor], *, denoiser: str) -> None:
    """UserError, naming the argument or the output, for a recorded call with numbers that are not finite.

    Masks may hold minus infinity: that is how attention is told to look away.
    """
    for name, tensor in call.items():
        if "mask" in name:
            continue
        if (fault := fault_of(tensor)) is not None:
            what = "the output" if name == "output" else f"the input {name}"
            raise UserError(
                f"{what} of the {denoiser} has {fault} numbers while it samples: give another model.dtype "
                "(float32 or bfloat16), or look for what in the model overflows"
            )


def check_images(images: Sequence[Tensor], texts: Sequence[str]) -> None:
    """UserError, naming the caption, for an image or latent with numbers that are not finite: a cast makes it black."""
    for image, text in zip(images, texts, strict=True):
        if (fault := fault_of(image)) is not None:
            raise UserError(
                f"the image of {text[:60]!r} has {fault} numbers: the model overflows while it samples; "
                "give model.dtype=float32 or bfloat16, or look for what in the model does"
            )
