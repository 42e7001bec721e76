"""Images of a prompt list: PNGs in fixed batches, every image from noise of its own."""

from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vqdm.config import SamplerConfig
from vqdm.models.loader import sample
from vqdm.prompts import Prompt, PromptList
from vqdm.seeds import torch_generator
from vqdm.stages.layout import batches, image_path, png_bytes
from vqdm.store import read_item, write_item


def _is_there(directory: Path, name: str, batch: tuple[Prompt, ...]) -> bool:
    record = read_item(directory, name)
    return record is not None and record["prompts"] == [[p.id, p.text] for p in batch]


def generate(
    directory: Path, make_pipeline, prompts: PromptList, *, sampler: SamplerConfig, batch_size: int, seed: int
) -> None:
    """Make the batches that are not there. `make_pipeline()` is called only if there is something to make.

    Images depend at 1e-6 on what else is in their batch, so a batch is made whole or not at all.
    """
    whole = [(name, rows, prompts.prompts[rows.start : rows.stop]) for name, rows in batches(len(prompts), batch_size)]
    pending = [(name, rows, batch) for name, rows, batch in whole if not _is_there(directory, name, batch)]
    if not pending:
        return
    pipeline = make_pipeline()
    for name, rows, batch in tqdm(pending, desc=f"generate {directory.name}", unit="batch"):
        generators = [torch_generator(seed, "image", p.id) for p in batch]
        images = sample(pipeline, [p.text for p in batch], sampler=sampler, generators=generators)
        paths = (image_path(Path(), index).as_posix() for index in rows)
        files = {path: png_bytes(image) for path, image in zip(paths, images, strict=True)}
        write_item(directory, name, files, {"prompts": [[p.id, p.text] for p in batch], "seed": seed})


def load_images(directory: Path, indices: range) -> np.ndarray:
    """uint8 [n, height, width, 3]."""
    return np.stack([np.asarray(Image.open(image_path(directory, i)).convert("RGB")) for i in indices])
