"""Images of a prompt list: PNGs in fixed batches, each image from its own noise, shared among the processes."""

from pathlib import Path

import numpy as np
from PIL import Image

from vqdm.config.options import SamplerConfig
from vqdm.prompts import ImageList, Prompt
from vqdm.runs import processes, progress
from vqdm.runs.heap import return_freed_memory
from vqdm.runs.items import batches, read_item, write_item
from vqdm.runs.threads import threads_that_are_free
from vqdm.runs.usage import Usage
from vqdm.seeds import torch_generator
from vqdm.stages.layout import image_path, label_of, png_bytes, readable


def noise_of(prompt: Prompt, copy: int) -> str:
    """The name from which an image's noise is drawn; for the first copy it is the prompt's own."""
    return prompt.id if copy == 0 else f"{prompt.id}/{copy}"


def generate(
    directory: Path,
    make_pipeline,
    images: ImageList,
    *,
    sampler: SamplerConfig,
    batch_size: int,
    seed: int,
    environment: dict,
) -> None:
    """Make the batches that are missing. `make_pipeline()` is called only if there is something to make.

    Arithmetic depends at 1e-6 on the size of a batch, but not on its other members. So batches are fixed ranges of
    images, and the last one is filled up: the numbers of images and of processes change no image.
    """
    whole = [(name, [images[row] for row in rows], rows) for name, rows in batches(len(images), batch_size)]
    pending = processes.my_share(lambda: [batch for batch in whole if not _is_there(directory, *batch[:2])])
    if not pending:  # then nothing heavy is imported
        return
    from vqdm.models.loader import sample

    return_freed_memory()  # as `Store.ensure` does before a stage
    usage, pipeline = Usage(), make_pipeline()
    with threads_that_are_free() as adjust_threads:
        for name, batch, rows in progress.over(pending, f"generate {label_of(directory)}", unit="batch"):
            adjust_threads()
            filled = batch + batch[-1:] * (batch_size - len(batch))
            generators = [torch_generator(seed, "image", noise_of(*image)) for image in filled]
            made = sample(pipeline, [p.text for p, _ in filled], sampler=sampler, generators=generators)[: len(batch)]
            paths = (image_path(Path(), index).as_posix() for index in rows)
            files = {path: png_bytes(image) for path, image in zip(paths, made, strict=True)}
            record = {"prompts": _texts(batch), "seed": seed, "environment": environment} | usage.so_far()
            write_item(directory, name, files, record)


def _texts(batch: list[tuple[Prompt, int]]) -> list[list[str]]:
    return [[p.id, p.text] for p, _ in batch]


def _is_there(directory: Path, name: str, batch: list[tuple[Prompt, int]]) -> bool:
    """True if a batch is there; one that holds more of the list than is asked for will do."""
    record = read_item(directory, name)
    return record is not None and record["prompts"][: len(batch)] == _texts(batch)


def load_images(directory: Path, indices: range) -> list[np.ndarray]:
    """Load images as uint8 [height, width, 3] each."""
    return [_load(image_path(directory, i)) for i in indices]


def _load(path: Path) -> np.ndarray:
    with readable(path), Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
