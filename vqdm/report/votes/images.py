"""The image sets of a vote: found by their runs, checked for equal captions and noise, and made indistinguishable.

A file's size tells a noisy image from a clean one, and its metadata may tell more. So images are decoded, written
anew from their pixels alone, and filled up with random bytes to the size of the largest; decoders ignore those.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vqdm.errors import UserError
from vqdm.prompts import ImageList
from vqdm.report.votes.study import DESTROYED, Trial
from vqdm.runs.items import item_names, peek
from vqdm.runs.store import Store
from vqdm.stages.layout import image_path, readable

TILES = 4  # a destroyed image is cut into 4 × 4 tiles that are shuffled and turned


@dataclass(frozen=True)
class Made:
    """One image of a set: its index, its caption, and the seed that its noise was drawn from."""

    index: int
    caption: str
    seed: int


@dataclass(frozen=True)
class ImageSet:
    """The images of one run, by (prompt id, copy)."""

    system: str  # the name of its run
    record: dict
    directory: Path
    images: dict[tuple[str, int], Made]

    def path(self, prompt: str, copy: int) -> Path:
        return image_path(self.directory, self.images[prompt, copy].index)


def image_set(results: Path, name: str, model: str) -> ImageSet:
    """The images of the newest run of this name on this model; UserError if there is none or it has no images."""
    runs = [
        (file.stat().st_mtime, record)
        for file, record in Store(results).runs()
        if record["experiment"] == name and record.get("model") == model and "generate" in record["directories"]
    ]
    if not runs:
        raise UserError(f"no finished run {name} on {model} under {results}; run its experiment first")
    record = max(runs, key=lambda run: run[0])[1]
    directory = results / record["directories"]["generate"]
    images: dict[tuple[str, int], Made] = {}
    copies: dict[str, int] = {}
    for item in item_names(directory):
        made = peek(directory, item).record
        for index, (prompt, text) in enumerate(made["prompts"], start=int(item)):  # named after its first image
            copy = copies.get(prompt, 0)  # images of one prompt follow each other
            images[prompt, copy], copies[prompt] = Made(index, text, made["seed"]), copy + 1
    if not images:
        raise UserError(f"{directory}: the images of the run {name} are not here; run its experiment again")
    return ImageSet(name, record, directory, images)


def chosen_images(sets: list[ImageSet], *, n: int | None, per_prompt: int | None) -> list[tuple[str, str, int]]:
    """(prompt id, caption, copy) of the images to compare: `per_prompt` for each of the first n prompts (None: all).

    UserError unless every set has them, with the same captions and noise.
    """
    first = sets[0]
    prompts = list(dict.fromkeys(prompt for prompt, _ in first.images))
    if n is not None and len(prompts) < n:
        raise UserError(f"{first.system} has images of {len(prompts)} prompts, not of {n}; give a smaller --n")
    kept = set(prompts[:n])
    copies = per_prompt or 1 + min(max(copy for name, copy in first.images if name == p) for p in kept)
    wanted = ImageList(prompts[:n], copies)
    for own in sets:
        for prompt, copy in wanted:
            _check_image(own, first, prompt, copy)
    return [(prompt, first.images[prompt, copy].caption, copy) for prompt, copy in wanted]


def _check_image(own: ImageSet, first: ImageSet, prompt: str, copy: int) -> None:
    made, expected = own.images.get((prompt, copy)), first.images.get((prompt, copy))
    if made is None or expected is None:
        name = own.system if made is None else first.system
        raise UserError(
            f"{name} has no image {copy} of the prompt {prompt}; run every system with the same evaluate.prompts, "
            "or give a smaller --n or --images-per-prompt"
        )
    if made.caption != expected.caption:
        raise UserError(
            f"{own.system} and {first.system} have other captions for {prompt}: {made.caption!r} and "
            f"{expected.caption!r}; run both with the same evaluate.prompts"
        )
    if made.seed != expected.seed:
        raise UserError(
            f"{own.system} and {first.system} made {prompt} from other noise (seeds {made.seed} and {expected.seed}); "
            "run both with the same evaluate.seed"
        )
    if not own.path(prompt, copy).is_file():
        raise UserError(f"{own.path(prompt, copy)} is missing; run the experiment {own.system} again")


def trial_images(
    trial: Trial, sets: dict[str, ImageSet], *, size: int | None, generator: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """Left and right image of a trial, equally large. A destroyed image is made from the other side's."""
    names = [trial.left, trial.right]
    whole = next(name for name in names if name != DESTROYED)
    left, right = (_load(sets[name if name in sets else whole].path(trial.prompt, trial.copy), size) for name in names)
    if left.size != right.size:
        raise UserError(
            f"{trial.left} and {trial.right} have images of {left.size} and {right.size} pixels, which would tell them "
            "apart; give --size"
        )
    if trial.left == DESTROYED:
        return _destroyed(left, generator), right
    return left, _destroyed(right, generator) if trial.right == DESTROYED else right


def _load(path: Path, size: int | None) -> Image.Image:
    """Load RGB pixels and nothing else. size: pixels of the longer side; None: as it is."""
    with readable(path), Image.open(path) as file:
        image = Image.fromarray(np.asarray(file.convert("RGB")))
    if size is None or size == max(image.size):
        return image
    scale = size / max(image.size)
    return image.resize(tuple(max(1, round(side * scale)) for side in image.size), Image.Resampling.LANCZOS)


def _destroyed(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """An image with the same colours but nothing left to recognise."""
    pixels = np.array(image)
    height, width = (side // TILES for side in pixels.shape[:2])
    view = pixels[: height * TILES, : width * TILES].reshape(TILES, height, TILES, width, 3)
    tiles = view.transpose(0, 2, 1, 3, 4).reshape(TILES**2, height, width, 3)
    shuffled = tiles[generator.permutation(len(tiles)), ::-1, ::-1].reshape(TILES, TILES, height, width, 3)
    pixels[: height * TILES, : width * TILES] = shuffled.transpose(0, 2, 1, 3, 4).reshape(
        height * TILES, width * TILES, 3
    )
    return Image.fromarray(pixels)


def encode(image: Image.Image, quality: int | None) -> bytes:
    """Encode as PNG, or as JPEG of this quality with colour at full resolution."""
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, format="png")
    else:
        image.save(buffer, format="jpeg", quality=quality, subsampling=0)
    return buffer.getvalue()


def fill_up(files: list[bytes], generator: np.random.Generator) -> list[bytes]:
    """Make all files as long as the longest by adding random bytes."""
    longest = max(map(len, files))
    return [file + generator.bytes(longest - len(file)) for file in files]
