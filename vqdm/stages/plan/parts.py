"""Bytes of a pipeline's other parts, quantized or as they are, before anything is loaded."""

from dataclasses import dataclass

from torch import nn

from vqdm.codecs.allocation import assign_part
from vqdm.config.options import Config
from vqdm.hub.checkpoint import checkpoint_size
from vqdm.models.location import DENOISERS
from vqdm.weights.layers import swap_empty


@dataclass(frozen=True)
class PartSize:
    """Bytes of a part's file, and of the same part in 16 bit."""

    bytes: int
    original: int
    scheme: str  # its codec's short name; 16 bit


def plan_parts(config: Config, modules: dict[str, nn.Module]) -> dict[str, PartSize]:
    """Sizes of all parts with weights but the denoiser. modules: on meta, by part; their layers are replaced."""
    codecs, found = config.parts.codecs(), {}
    for name, module in sorted(modules.items()):
        if name in DENOISERS or name == "denoiser":
            continue
        codec = codecs.get("text_encoders" if name.startswith("text_encoder") else name)
        original, scheme = checkpoint_size(module).total, "16 bit"
        if codec is not None:
            scheme = codec.name
            swap_empty(module, assign_part(module, codec, embeddings=config.parts.embeddings).quantized)
        found[name] = PartSize(checkpoint_size(module).total, original, scheme)
    return found


def part_lines(parts: dict[str, PartSize], denoiser: int) -> list[str]:
    """A line for every part, and one with the sum; none without parts."""
    if not parts:
        return []
    lines = [
        f"  {name:16s} {part.scheme:>9s} {part.bytes:>13,} bytes, {part.original:,} in 16 bit"
        for name, part in parts.items()
    ]
    total = denoiser + sum(part.bytes for part in parts.values())
    return ["parts beside the denoiser:", *lines, f"the whole pipeline: {total:,} bytes ({total / 1e9:.2f} GB)"]
