"""Images of a prompt list: PNGs in fixed batches, every image from noise of its own, shared among the processes."""

from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vqdm.config.options import SamplerConfig
from vqdm.prompts import Prompt, PromptList
from vqdm.runs import processes
from vqdm.runs.items import batches
from vqdm.runs.store import read_item, write_item
from vqdm.seeds import torch_generator
from vqdm.stages.layout import image_path, png_bytes, readable


def copies_of(prompts: PromptList, count: int) -> list[tuple[Prompt, str]]:
    """(prompt, name of its noise) of every image, prompt after prompt; the first copy's noise is the prompt's own."""
    return [(p, p.id if copy == 0 else f"{p.id}/{copy}") for p in prompts.prompts for copy in range(count)]


def generate(
    directory: Path, make_pipeline, prompts: PromptList, *, sampler: SamplerConfig, batch_size: int, seed: int,
    images_per_prompt: int = 1, environment: dict,
) -> None:  # fmt: skip
    """Make the batches that are not there. `make_pipeline()` is called only if there is something to make.

    Arithmetic depends at 1e-6 on the size of a batch, but not on what else is in it. So batches are fixed ranges of
    images, and the last one is filled up: how many images there are, and how many processes make them, changes none.
    """
    images = copies_of(prompts, images_per_prompt)
    whole = [(name, images[rows.start : rows.stop], rows) for name, rows in batches(len(images), batch_size)]
    pending = processes.my_share(lambda: [batch for batch in whole if not _is_there(directory, *batch[:2])])
    if not pending:  # then nothing heavy is imported
        return
    from vqdm.models.loader import sample

    pipeline = make_pipeline()
    for name, batch, rows in tqdm(pending, desc=f"generate {directory.name}", unit="batch"):
        filled = batch + batch[-1:] * (batch_size - len(batch))
        generators = [torch_generator(seed, "image", noise) for _, noise in filled]
        made = sample(pipeline, [p.text for p, _ in filled], sampler=sampler, generators=generators)[: len(batch)]
        paths = (image_path(Path(), index).as_posix() for index in rows)
        files = {path: png_bytes(image) for path, image in zip(paths, made, strict=True)}
        record = {"prompts": _texts(batch), "seed": seed, "environment": environment}
        write_item(directory, name, files, record)


def _texts(batch: list[tuple[Prompt, str]]) -> list[list[str]]:
    return [[p.id, p.text] for p, _ in batch]


def _is_there(directory: Path, name: str, batch: list[tuple[Prompt, str]]) -> bool:
    """A batch that holds more of the list than is asked for serves as well."""
    record = read_item(directory, name)
    return record is not None and record["prompts"][: len(batch)] == _texts(batch)


def load_images(directory: Path, indices: range) -> list[np.ndarray]:
    """uint8 [height, width, 3] each."""
    return [_load(image_path(directory, i)) for i in indices]


def _load(path: Path) -> np.ndarray:
    with readable(path), Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
