"""Features of a set of images by the networks of one family of metrics: columns in fixed batches, restartable.

Images are looked at once, batch after batch; scores are computed from these files. So memory does not grow with the
number of images, another reference or bootstrap costs seconds, and two methods can be compared draw by draw.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from vqdm.runs import processes, progress
from vqdm.runs.items import batches, peek, read_item, write_item
from vqdm.runs.threads import threads_that_are_free
from vqdm.stages.generate import load_images
from vqdm.stages.layout import captions_in, image_path, label_of


def extract(
    directory: Path,
    images: Path,
    originals: Path | None,
    *,
    count: int,
    batch_size: int,
    make_extractor,
    environment: dict,
    of_model: bool = False,
) -> None:
    """Make the batches that are missing or whose images have changed.

    originals: the full-precision images, for a family of pairs. of_model: the extractor asks a model, and takes the
    prompts with their ids. `make_extractor()` is called only if there is work.
    """
    sources = [folder for folder in (images, originals) if folder is not None]

    def find_pending() -> list[tuple[str, range, str]]:
        whole = [(name, rows, _identity(sources, name)) for name, rows in batches(count, batch_size)]
        return [batch for batch in whole if not _is_there(directory, *batch)]

    pending = processes.my_share(find_pending)
    if not pending:  # then nothing heavy is imported
        return
    from safetensors.torch import save as to_bytes

    extractor = make_extractor()
    with threads_that_are_free() as adjust_threads:
        for name, rows, identity in progress.over(pending, f"features {label_of(directory)}", unit="batch"):
            adjust_threads()
            if of_model:
                columns = extractor.columns(peek(images, name).record["prompts"][: len(rows)])
            elif originals is None:
                columns = extractor.columns(load_images(images, rows), captions_in(images, name)[: len(rows)])
            else:
                columns = extractor.columns(np.stack(load_images(images, rows)), np.stack(load_images(originals, rows)))
            files = {_file(name): to_bytes({key: column.contiguous() for key, column in columns.items()})}
            write_item(directory, name, files, {"images": identity, "rows": len(rows), "environment": environment})


def load_columns(directory: Path, count: int, batch_size: int) -> dict:
    """All columns of the first `count` images: {name: tensor [count, …]}."""
    import torch
    from safetensors import safe_open

    parts: dict[str, list[torch.Tensor]] = {}
    for name, rows in batches(count, batch_size):
        with safe_open(directory / _file(name), "pt") as file:
            for key in file.keys():  # noqa: SIM118 (no dict)
                parts.setdefault(key, []).append(file.get_slice(key)[: len(rows)])
    return {key: torch.cat(columns) for key, columns in parts.items()}


def environments(directory: Path, count: int, batch_size: int) -> list[dict]:
    """The different environments in which batches were made, in order."""
    records = (peek(directory, name).record for name, _ in batches(count, batch_size))
    return list({json.dumps(record["environment"]): record["environment"] for record in records}.values())


def images_sha256(folders: list[Path], count: int, batch_size: int) -> str:
    """Checksum over the checksums of the first `count` images of each folder, as their items keep them."""
    digest = hashlib.sha256()
    for folder in folders:
        for name, rows in batches(count, batch_size):
            files = peek(folder, name).files
            digest.update("".join(files[image_path(Path(), i).as_posix()]["sha256"] for i in rows).encode())
    return digest.hexdigest()


def _file(name: str) -> str:
    return f"features/{name}.safetensors"


def _identity(sources: list[Path], name: str) -> str:
    """Checksum over a batch of images: their files' checksums, as their items keep them, and their captions."""
    digest = hashlib.sha256()
    for folder in sources:
        item = peek(folder, name)
        digest.update(json.dumps([item.record["prompts"], item.files], sort_keys=True).encode())
    return digest.hexdigest()


def _is_there(directory: Path, name: str, rows: range, identity: str) -> bool:
    record = read_item(directory, name)
    return record is not None and record["images"] == identity and record["rows"] >= len(rows)
