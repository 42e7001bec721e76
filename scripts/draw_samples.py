"""A grid of the first samples of a generate stage, with their captions.

python scripts/draw_samples.py results/stages/generate/tiny-fp-<fp8> docs/images/tiny_samples.png [--count 32]
"""

import argparse
import textwrap
from pathlib import Path

from vqdm.runs.command_line import run_script

from PIL import Image, ImageDraw, ImageFont

from vqdm.stages.layout import captions_of, image_path

COLUMNS, CELL, TEXT, GAP = 8, 112, 62, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=32)
    options = parser.parse_args()
    captions = captions_of(options.directory, options.count)
    rows = -(-options.count // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (CELL + GAP), rows * (CELL + TEXT + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for index in range(options.count):
        x, y = index % COLUMNS * (CELL + GAP), index // COLUMNS * (CELL + TEXT + GAP)
        image = Image.open(image_path(options.directory, index)).convert("RGB")
        sheet.paste(image.resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text((x, y + CELL + 2), "\n".join(textwrap.wrap(captions[index], 21)), "black", font, spacing=1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.output, optimize=True)


if __name__ == "__main__":
    run_script(main)
