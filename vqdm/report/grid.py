"""A picture of what the methods do: rows = prompts, columns = methods, same noise."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vqdm.atomic import atomic_write
from vqdm.stages.layout import captions_of, image_path, png_bytes

CELL, GAP, MARGIN, TOP = 128, 6, 220, 30


def write_grid(path: Path, records: list[dict], results: Path, *, count: int = 8) -> None:
    """The first `count` prompts of each run record; images are enlarged or shrunk to 128 pixels."""
    directories = [results / record["directories"]["generate"] for record in records]
    captions = captions_of(directories[0], count)
    width = MARGIN + len(records) * (CELL + GAP)
    sheet = Image.new("RGB", (width, TOP + len(captions) * (CELL + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for column, record in enumerate(records):
        bits = record["bits"]["bits_per_weight"]
        draw.text((MARGIN + column * (CELL + GAP), 8), f"{record['method']} ({bits:.2f})", "black", font)
    for row, caption in enumerate(captions):
        y = TOP + row * (CELL + GAP)
        draw.multiline_text((8, y + 8), "\n".join(textwrap.wrap(caption, 28)), "black", font)
        for column, directory in enumerate(directories):
            image = Image.open(image_path(directory, row)).convert("RGB")
            kind = Image.Resampling.NEAREST if image.width < CELL else Image.Resampling.LANCZOS
            sheet.paste(image.resize((CELL, CELL), kind), (MARGIN + column * (CELL + GAP), y))
    atomic_write(path, png_bytes(sheet))
