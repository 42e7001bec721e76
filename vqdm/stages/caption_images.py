"""Images that belong to captions: a folder of <prompt id>.png or .jpg. Imports nothing heavy."""

from collections.abc import Iterable
from pathlib import Path

from vqdm.errors import UserError
from vqdm.prompts import Prompt

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


def check_caption_images(folder: str | Path, prompts: Iterable[Prompt]) -> None:
    """UserError for the first caption without an image, before any work."""
    for prompt in prompts:
        caption_image(folder, prompt)
