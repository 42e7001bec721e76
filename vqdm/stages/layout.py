"""How images lie in a stage's directory, for those who write and those who only read them. Imports nothing heavy."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from vqdm.errors import UserError
from vqdm.runs.items import item_names, peek

DENOISER = "denoiser"  # of a quantize stage: the directory of the quantized model, as diffusers loads it
ERRORS_FILE = "errors.json"  # of a stage that makes a denoiser: its output's relative squared error by timestep
SCRATCH = {  # by stage: what serves to go on after a stop, and holds the weights of `denoiser/` a second time
    "quantize": ("items/*", "layers/*", "shared_*.safetensors"),
    "tune_blocks": ("items/*", "blocks/*"),
}
MADE_BY = ("torch", "diffusers")  # libraries whose versions the environment of a batch of images says
SCORES_FILE = "metrics.json"  # of an evaluate stage: every metric with its protocol
IMAGES_FILE = "images.csv"  # of an evaluate stage: every image's own scores


def image_path(directory: Path, index: int) -> Path:
    return directory / "images" / f"{index:06d}.png"


def captions_in(directory: Path, name: str) -> list[str]:
    """The captions of the images of one batch, from its item's record."""
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
    """UserError where what is inside finds that the image is not there, or is none."""
    try:
        yield
    except (OSError, SyntaxError) as error:  # Pillow calls some damaged PNGs a SyntaxError
        raise UserError(f"{path} is no readable image ({error}); run its experiment again") from error


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()
