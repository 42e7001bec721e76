"""A picture to compare methods: rows are captions, columns are methods, all from the same noise."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vqdm.runs.files import atomic_write
from vqdm.stages.layout import captions_of, image_path, png_bytes, readable

CELL, GAP, MARGIN = 128, 6, 220
LINE, PADDING = 18, 8  # pixels: of a line of text, and about titles


def write_grid(path: Path, records: list[dict], results: Path, *, count: int = 8) -> None:
    """Write the first `count` images of each run, or as many as all have, scaled to 128 pixels.

    Runs with other captions than the first are left out.
    """
    captions = captions_of(_images(records[0], results), count)
    found = [(record, captions_of(_images(record, results), count)) for record in records]
    records = [record for record, own in found if all(a == b for a, b in zip(own, captions, strict=False))]
    captions = captions[: min(len(own) for record, own in found if record in records)]
    directories = [_images(record, results) for record in records]
    titles = [textwrap.wrap(f"{r['method']} ({r['bits']['bits_per_weight']:.2f})", 18) for r in records]
    top = LINE * max(map(len, titles)) + 2 * PADDING
    size = (MARGIN + len(records) * (CELL + GAP), top + len(captions) * (CELL + GAP))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for column, title in enumerate(titles):
        draw.multiline_text((MARGIN + column * (CELL + GAP), PADDING), "\n".join(title), "black", font)
    for row, caption in enumerate(captions):
        y = top + row * (CELL + GAP)
        draw.multiline_text((8, y + 8), "\n".join(textwrap.wrap(caption, 28)), "black", font)
        for column, directory in enumerate(directories):
            with readable(image_path(directory, row)):
                image = Image.open(image_path(directory, row)).convert("RGB")
            kind = Image.Resampling.NEAREST if image.width < CELL else Image.Resampling.LANCZOS
            sheet.paste(image.resize((CELL, CELL), kind), (MARGIN + column * (CELL + GAP), y))
    atomic_write(path, png_bytes(sheet))


def _images(record: dict, results: Path) -> Path:
    return results / record["directories"]["generate"]
