"""The model card beside every saved denoiser: what it is, how many bits it takes, how to load it."""

import io
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from PIL.Image import Image
from torch import nn

from vqdm.acceleration.operators import removed_operators
from vqdm.hub.checkpoint import checkpoint_size
from vqdm.models.location import DENOISERS
from vqdm.runs.files import atomic_write
from vqdm.runs.texts import in_markdown, in_one_line
from vqdm.weights.bits import count_bits
from vqdm.weights.layers import quantized_layers

CARD_FILE, PICTURE_FILE = "README.md", "picture.png"  # in a pipeline's directory
log = logging.getLogger("vqdm")
LICENCES = {  # licences of models whose own card is rarely beside their weights
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/sdxl-turbo": "sai-nc-community",
}
_TABLE = "| | |\n|---|---|\n"
_TEXT = """---
{front}
---

# {title}

The denoiser ({denoiser}) of {base}, quantized with vqdm.

{table}{rows}

Load it with diffusers; nothing but the import of vqdm is new:

```python
{imports}
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this directory"{dtype})
pipeline("a red bicycle by the sea").images[0].save("image.png")
```

Licence: {licence}
"""


def model_card(denoiser: nn.Module, *, metrics: Mapping[str, float], base: str | None) -> str:
    """The card as Markdown with the hub's front matter. base: full precision, a hub id or a directory.

    A quantized model that is saved again keeps the origin that its own card names.
    """
    licence = licence_of(base)
    name = "a model of unknown name" if base is None else base
    if base is not None and Path(base).exists():  # a path on this machine is nobody's business
        folder = Path(base).parent if Path(base).name in DENOISERS else Path(base)
        card = card_data(base)
        known = card.get("base_model") if "vqdm" in (card.get("tags") or []) else None
        base = known if isinstance(known, str) else None
        name = base or folder.name
    small = denoiser.dtype in (torch.float16, torch.bfloat16)  # the text encoders are too, and diffusers has to know
    counts, layers = count_bits(denoiser), quantized_layers(denoiser)
    schemes = Counter(_family(layer.weight.scheme) for layer in layers.values())
    rows = {
        "scheme": ", ".join(f"{name} ({count} layers)" for name, count in schemes.items()) or "none: weights in 16 bit",
        "bits per weight, everything counted": f"{counts.bits_per_weight:.3f}",
        "bits per weight of the quantized layers": f"{counts.bits_quantized:.3f}",
        "bytes": f"{checkpoint_size(denoiser).total:,}",
    } | {name.replace("_", " "): f"{value:.4g}" for name, value in metrics.items()}
    if removed := removed_operators(denoiser):
        rows["operators taken out"] = f"{len(removed)}: {', '.join(removed)}"
    front = ModelCardData(
        library_name="diffusers", tags=["vqdm", "quantized", "text-to-image"], base_model=base, license=licence
    )
    return _TEXT.format(
        front=front.to_yaml().strip(),
        title=in_markdown(f"{base or type(denoiser).__name__}, {', '.join(schemes) or 'pruned'}"),
        denoiser=type(denoiser).__name__,
        base=in_markdown(name),
        imports="import torch\nimport vqdm" if small else "import vqdm",
        dtype=f", dtype={denoiser.dtype}" if small else "",
        table=_TABLE,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        licence=f"that of the base model, {in_markdown(licence)}."
        if licence
        else "that of the base model, which is not known here.",
    )


def add_picture(directory: Path, picture: Image, *, caption: str, steps: int) -> None:
    """Write what a pipeline sampled beside its card, which then shows it above the table. steps: of the sampler."""
    content = io.BytesIO()
    picture.save(content, format="png")
    shown = f"![{PICTURE_FILE}]({PICTURE_FILE})\n\nMade by this pipeline in {steps} steps: {in_markdown(caption)}\n\n"
    card = (directory / CARD_FILE).read_text(encoding="utf-8").replace(_TABLE, shown + _TABLE, 1)
    atomic_write(directory / PICTURE_FILE, content.getvalue())
    atomic_write(directory / CARD_FILE, card.encode())


def _family(scheme) -> str:
    """Name of a scheme without the numbers that differ from layer to layer."""
    if "bits" not in scheme.decoder.told_by_shapes:
        return scheme.name
    rank = getattr(scheme, "rank", None)
    return scheme.codec if rank is None else f"{scheme.codec} with a branch of rank {rank}"


def licence_of(base: str | None) -> str | None:
    """The licence of a base model: from its own card if it is a directory, else from `LICENCES`."""
    licence = card_data(base).get("license")
    return licence if licence and isinstance(licence, str) else LICENCES.get(base or "")


def card_data(base: str | None) -> dict:
    """The front matter of the card in a directory; empty without one, or, said in a line, with a damaged one.

    It only decorates: what took hours to compress is saved without it too.
    """
    card = Path(base or "") / CARD_FILE
    if not base or not card.is_file():
        return {}
    try:
        return ModelCard.load(card).data.to_dict()
    except Exception as error:  # of YAML, of text in another encoding, of what the hub's package makes of its values
        log.warning("%s cannot be read (%s); the new card goes without it", card, in_one_line(str(error))[:200])
        return {}
