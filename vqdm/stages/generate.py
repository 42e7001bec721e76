"""Images of a prompt list: PNGs in fixed batches, every image from noise of its own."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vqdm.config import SamplerConfig
from vqdm.models.loader import sample
from vqdm.prompts import Prompt, PromptList
from vqdm.seeds import torch_generator
from vqdm.stages.layout import image_path
from vqdm.store import read_item, write_item


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def _batches(prompts: PromptList, batch_size: int) -> list[tuple[int, tuple[Prompt, ...]]]:
    """Fixed index ranges: images depend at 1e-6 on what else is in their batch, so a batch is made whole or not."""
    rows = prompts.prompts
    return [(start, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def _is_there(directory: Path, start: int, batch: tuple[Prompt, ...]) -> bool:
    record = read_item(directory, f"{start:06d}")
    return record is not None and record["prompts"] == [[p.id, p.text] for p in batch]


def generate(
    directory: Path, make_pipeline, prompts: PromptList, *, sampler: SamplerConfig, batch_size: int, seed: int
) -> None:
    """Make the batches that are not there. `make_pipeline()` is called only if there is something to make."""
    pending = [(s, b) for s, b in _batches(prompts, batch_size) if not _is_there(directory, s, b)]
    if not pending:
        return
    pipeline = make_pipeline()
    for start, batch in tqdm(pending, desc=f"generate {directory.name}", unit="batch"):
        generators = [torch_generator(seed, "image", p.id) for p in batch]
        images = sample(pipeline, [p.text for p in batch], sampler=sampler, generators=generators)
        files = {image_path(Path(), start + i).as_posix(): _png(image) for i, image in enumerate(images)}
        record = {"prompts": [[p.id, p.text] for p in batch], "seed": seed}
        write_item(directory, f"{start:06d}", files, record)


def load_images(directory: Path, indices: range) -> np.ndarray:
    """uint8 [n, height, width, 3]."""
    return np.stack([np.asarray(Image.open(image_path(directory, i)).convert("RGB")) for i in indices])
