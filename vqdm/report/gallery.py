"""The gallery of a report page: which prompts, their scores, and the images as data URLs, within a budget."""

import base64
import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vqdm.errors import UserError
from vqdm.prompts import ImageList
from vqdm.stages.layout import image_path, png_bytes, readable

LARGEST = 512  # pixels on the longer side; larger images are shrunk, since no browser opens a page of 1024² PNGs
WEBP_QUALITY = 85
TAG_BYTES = 80  # bytes of the element around a row's images


@dataclass(frozen=True)
class PageMethod:
    """One column of the gallery; None for what was not made."""

    name: str
    images: Path | None = None  # its generate stage's directory
    scores: Path | None = None  # its evaluate stage's images.csv
    layers: Path | None = None  # its quantize stage's layers.json
    size: str = ""  # text for the page: "3.70 bits, 1.65 MiB"


@dataclass(frozen=True)
class Scores:
    """The per-image scores of some methods; a value is None where a method has no such score for an image."""

    names: tuple[str, ...]
    methods: tuple[dict[str, list[float | None]], ...]

    def of_row(self, row: int) -> list[list[float | None]]:
        """Values of one row as [score][method]."""
        return [[_at(method.get(name, []), row) for method in self.methods] for name in self.names]

    def worst_first(self, name: str, count: int, *, lower_is_better: bool) -> list[int]:
        """Rows sorted by the worst value of any method; rows without a value come last, ties keep their order."""
        sign = -1 if lower_is_better else 1

        def key(row: int) -> float:
            values = [_at(method.get(name, []), row) for method in self.methods]
            return min((sign * value for value in values if value is not None), default=math.inf)

        return sorted(range(count), key=key)


@dataclass(frozen=True)
class Gallery:
    """Rows in the order of the prompts, as JSON for the page's scripts."""

    methods: tuple[PageMethod, ...]  # those that have images
    scores: Scores
    rows: tuple[str, ...] = ()  # {prompt, copy, text, scores [score][method]}
    images: tuple[str, ...] = ()  # [data URL of each method, null where there is no image]
    total: int = 0  # number of rows without a budget
    worst_by: str | None = None  # the score that chose rows besides the first ones, if one did
    original: tuple[int, int] = (1, 1)  # pixels (width, height) of the first image's file
    shown: tuple[int, int] = (1, 1)  # the same as embedded in the page


def _at(values: Sequence, row: int):
    return values[row] if row < len(values) else None


def _number(text: str | None) -> float | None:
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else None


def read_scores(methods: Sequence[PageMethod]) -> Scores:
    """Per-image scores in the order of the images; a UserError if two methods were scored on different prompts."""
    tables, first_ids, first_path = [], [], None
    for method in methods:
        if method.scores is None:
            tables.append({})
            continue
        with method.scores.open(newline="", encoding="utf-8") as file:
            records = list(csv.DictReader(file))
        ids = [(record["prompt"], record.get("copy")) for record in records]
        common = min(len(ids), len(first_ids))
        if ids[:common] != first_ids[:common]:
            raise UserError(f"{method.scores} and {first_path} score different prompts; evaluate both on the same list")
        if len(ids) > len(first_ids):
            first_ids, first_path = ids, method.scores
        names = [name for name in (records[0] if records else {}) if name not in ("prompt", "copy")]
        tables.append({name: [_number(record[name]) for record in records] for name in names})
    names = dict.fromkeys(name for table in tables for name in table)
    return Scores(tuple(names), tuple(tables))


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def embed_image(path: Path) -> tuple[str, tuple[int, int], tuple[int, int]]:
    """(data URL, original size, size shown) of an image: the PNG itself, or a WebP of at most `LARGEST` pixels."""
    with Image.open(path) as image:
        size = image.size
        if max(size) <= LARGEST:
            plain = image.format == "PNG" and image.mode == "RGB"
            return _data_url("png", path.read_bytes() if plain else png_bytes(image.convert("RGB"))), size, size
        small = image.convert("RGB")
    small.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="webp", quality=WEBP_QUALITY)
    return _data_url("webp", buffer.getvalue()), size, small.size


def _alternating(first: Sequence[int], second: Sequence[int]) -> Iterator[int]:
    """Yield all rows, each once, in turn from `first` and `second`."""
    seen: set[int] = set()
    for pair in zip(first, second, strict=True):
        for row in pair:
            if row not in seen:
                seen.add(row)
                yield row


def _row_images(methods: Sequence[PageMethod], row: int) -> tuple[list, tuple | None]:
    """Data URLs of a row (None without an image), and the sizes of its first image."""
    urls, sizes = [], None
    for method in methods:
        path = image_path(method.images, row)
        if not path.is_file():
            urls.append(None)
            continue
        with readable(path):
            url, *of_file = embed_image(path)
        urls.append(url)
        sizes = sizes or tuple(of_file)
    return urls, sizes


def script_json(obj) -> str:
    """JSON that cannot end the <script> around it, whatever it holds; ASCII only, so that U+2028 is escaped too."""
    text = json.dumps(obj, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def empty_gallery(methods: Sequence[PageMethod]) -> Gallery:
    """A gallery with its columns but no rows yet."""
    methods = tuple(method for method in methods if method.images is not None)
    return Gallery(methods, read_scores(methods))


def fill_gallery(
    gallery: Gallery,
    prompts: Sequence[str],
    images_per_prompt: int,
    *,
    worst_by: str,
    lower_is_better: Sequence[str],
    budget: int,
) -> Gallery:
    """Fill a gallery with as many rows as `budget` bytes hold, in turn from the first and from the worst by one score.

    A row is one image of every method from the same prompt and noise.
    """
    scores, images = gallery.scores, ImageList(prompts, images_per_prompt)
    total = len(images)
    name = worst_by if worst_by in scores.names else next(iter(scores.names), None)
    worst = scores.worst_first(name, total, lower_is_better=name in lower_is_better) if name else range(total)
    rows: dict[int, tuple[str, str]] = {}
    sizes, left = None, budget
    for row in _alternating(range(total), worst):
        prompt, copy = images.place(row)
        urls, row_sizes = _row_images(gallery.methods, row)
        entry = {"prompt": prompt, "copy": copy, "text": prompts[prompt], "scores": scores.of_row(row)}
        texts = script_json(entry), script_json(urls)
        left -= sum(map(len, texts)) + TAG_BYTES
        if left < 0:
            break
        rows[row], sizes = texts, sizes or row_sizes
    if not rows:
        raise UserError(
            f"the page has no room for one row of {len(gallery.methods)} images: {-left / 2**20:.3f} MiB are missing; "
            "give it a larger max_mib"
        )
    entries, encoded = zip(*(rows[row] for row in sorted(rows)), strict=True)
    by = name if len(rows) < total else None
    return Gallery(gallery.methods, scores, entries, encoded, total, by, *(sizes or ((1, 1), (1, 1))))
