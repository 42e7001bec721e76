"""Images that belong to captions: a folder of <prompt id>.png or .jpg. Imports nothing heavy."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from vqdm.errors import UserError
from vqdm.prompts import Prompt
from vqdm.runs.files import sha256_file

ENDINGS = ("png", "jpg", "jpeg")


def caption_image(folder: str | Path, prompt: Prompt) -> Path:
    """The file of a caption's image; UserError if there is none."""
    for ending in ENDINGS:
        path = Path(folder) / f"{prompt.id}.{ending}"
        if path.is_file():
            return path
    raise UserError(
        f"{folder} has no {prompt.id}.png or .jpg: finetune.trajectories.images needs the image of every caption"
    )


def images_identity(folder: str | Path, prompts: Iterable[Prompt]) -> str:
    """sha256 over the images of the captions; UserError for the first caption without one."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.id} {sha256_file(caption_image(folder, prompt))}\n".encode())
    return digest.hexdigest()
