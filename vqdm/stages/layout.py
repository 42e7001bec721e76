"""Where a stage's files are, for those who only read them. Imports nothing heavy."""

from pathlib import Path


def image_path(directory: Path, index: int) -> Path:
    return directory / "images" / f"{index:06d}.png"
