"""Layout of stage directories, for code that writes and code that only reads them. Imports nothing heavy."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from vqdm.errors import UserError
from vqdm.runs.items import item_names, peek

DENOISER = "denoiser"  # in a stage that makes a denoiser: the directory that diffusers loads
ERRORS_FILE = "errors.json"  # in such a stage: the output's relative squared error by timestep
SCRATCH = {  # by stage: files needed only to go on after a stop, which hold the weights of `denoiser/` once more
    "quantize": ("items/*", "layers/*", "shared_*.safetensors"),
    "tune_blocks": ("items/*", "blocks/*"),
    "scores": ("items/*", "original.safetensors"),
    "parts": ("layers/*",),
    "activations": ("items/*", "seen/*"),
    "correct": ("items/*", "sums/*"),
    "few_step": ("items/*", "checkpoints/*"),
}
MADE_BY = ("torch", "diffusers")  # libraries whose versions are kept with a batch of images
SCORES_FILE = "metrics.json"  # in an evaluate stage: every metric with its protocol
IMAGES_FILE = "images.csv"  # in an evaluate stage: the scores of every image


def label_of(directory: Path) -> str:
    """A stage's label, from the directory that is named by it and its fingerprint; another directory's own name."""
    return directory.name.rpartition("-")[0] or directory.name


def image_path(directory: Path, index: int) -> Path:
    return directory / "images" / f"{index:06d}.png"


def captions_in(directory: Path, name: str) -> list[str]:
    """The captions of one batch's images, from its item's record."""
    return [text for _, text in peek(directory, name).record["prompts"]]


def captions_of(directory: Path, count: int) -> list[str]:
    """The captions of the first `count` images."""
    texts: list[str] = []
    for name in item_names(directory):
        texts += captions_in(directory, name)
        if len(texts) >= count:
            break
    return texts[:count]


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise UserError if the code inside finds that an image is missing or cannot be read."""
    try:
        yield
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some damaged PNGs
        raise UserError(f"{path} is no readable image ({error}); run its experiment again") from error


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()
