"""Image files in folders and .zip archives, read in place, with the same names in both. Imports no torch."""

import hashlib
import io
import posixpath
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from vqdm.errors import UserError
from vqdm.prompts import PromptList
from vqdm.runs import progress

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")  # modes of 8 bits per channel


@dataclass(frozen=True)
class ImageFile:
    """An image file.

    name: relative to the deepest folder that holds all images of its source, so that a folder and its .zip agree.
    """

    name: str
    source: Path
    read: Callable[[], bytes]


def list_images(sources: list[Path]) -> list[ImageFile]:
    """All images of all sources by name; UserError for a source that is neither, or for a name that occurs twice."""
    found = [image for source in sources for image in _in_source(source)]
    name, times = Counter(image.name for image in found).most_common(1)[0]
    if times > 1:
        raise UserError(f"{times} images are called {name}; give sources whose images have names of their own")
    return sorted(found, key=lambda image: image.name)


def _in_source(source: Path) -> list[ImageFile]:
    if source.is_dir():
        files = {path.relative_to(source).as_posix(): path for path in source.rglob("*") if path.is_file()}
        readers = {name: path.read_bytes for name, path in files.items()}
    else:
        try:
            archive = zipfile.ZipFile(source)  # stays open, as its images are read one by one
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{source} is no folder of images and no .zip archive; correct the path") from error
        names = (info.filename for info in archive.infolist() if not info.is_dir())
        readers = {name: lambda name=name: archive.read(name) for name in names}
    images = {name: read for name, read in readers.items() if _is_image(PurePosixPath(name))}
    if not images:
        raise UserError(f"{source} holds no images ({', '.join(SUFFIXES)}); give a folder or a .zip archive that does")
    common = posixpath.commonpath([posixpath.dirname(name) for name in images])
    return [ImageFile(posixpath.relpath(name, common or "."), source, read) for name, read in images.items()]


def _is_image(path: PurePosixPath) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def images_of(prompts: PromptList, images: list[ImageFile]) -> list[ImageFile]:
    """The distinct images that the captions belong to, by name; folders in a name need not agree."""
    wanted = {prompt.image for prompt in prompts.prompts}
    if None in wanted:
        raise UserError(f"{prompts.origin}: not all captions name their image; give a list with a file_name column")
    whole, last = {image.name: image for image in images}, {PurePosixPath(image.name).name: image for image in images}
    times = Counter(PurePosixPath(image.name).name for image in images)
    found = {name: whole.get(name) or last.get(PurePosixPath(name).name) for name in wanted}
    if absent := sorted(name for name, image in found.items() if image is None):
        raise UserError(f"{len(absent)} of {len(found)} images of the captions are in no source, first {absent[0]}")
    if unclear := sorted(name for name in found if name not in whole and times[PurePosixPath(name).name] > 1):
        raise UserError(f"{unclear[0]} of the captions is the name of several images; give the source that is meant")
    return sorted({image.name: image for image in found.values()}.values(), key=lambda image: image.name)


def check_images(images: list[ImageFile]) -> list[tuple[str, str]]:
    """(name, sha256 of the file) for every image; UserError naming the files that cannot be decoded."""
    with ThreadPoolExecutor() as threads:
        hashes = list(progress.over(threads.map(_checked, images), "reading", unit="image", total=len(images)))
    if broken := [f"{image.source}: {image.name}" for image, one in zip(images, hashes, strict=True) if one is None]:
        shown = ", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
        raise UserError(f"unreadable images of 8 bits: {shown}; fetch them again or take them out")
    return [(image.name, one) for image, one in zip(images, hashes, strict=True)]


def _checked(image: ImageFile) -> str | None:
    try:
        data = image.read()
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            return hashlib.sha256(data).hexdigest() if picture.mode in MODES else None
    except Exception:  # from one of Pillow's many readers, a damaged archive, or a picture too large to be one
        return None


def load_image(image: ImageFile) -> np.ndarray:
    """Pixels as uint8 [height, width, 3]; other modes become RGB as Pillow does it; metadata rotates nothing."""
    with Image.open(io.BytesIO(image.read())) as picture:
        return np.asarray(picture.convert("RGB"))
