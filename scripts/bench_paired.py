"""CPU time of the family `paired` (PSNR and SSIM) on one thread, all included: PNGs, checksums, features.

python scripts/bench_paired.py                   # 64 pairs of 1024 × 1024: at most 120 s of CPU, else exit code 1
python scripts/bench_paired.py --images 8 --size 512
"""

import argparse
import functools
import os
import sys
import tempfile
import time
from pathlib import Path

from vqdm.runs.command_line import run_script

import numpy as np

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

from PIL import Image

from vqdm.metrics.extractors import make_extractor
from vqdm.runs.items import batches, write_item
from vqdm.seeds import numpy_generator
from vqdm.stages.features import extract, load_columns
from vqdm.stages.layout import image_path, png_bytes

LONGEST, BATCH = 120, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=1024)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        own, originals, features = (Path(place) / name for name in ("own", "originals", "features"))
        _write(options.images, options.size, own, originals)
        began = time.process_time()
        extract(
            features,
            own,
            originals,
            count=options.images,
            batch_size=BATCH,
            environment={},
            make_extractor=functools.partial(make_extractor, "paired", [], device="cpu"),
        )
        columns = load_columns(features, options.images, BATCH)
        spent = time.process_time() - began
    means = ", ".join(f"{name} {float(column.mean()):.4f}" for name, column in sorted(columns.items()))
    print(f"{options.images} pairs of {options.size}²: {spent:.1f} s of CPU on one thread (at most {LONGEST}); {means}")
    sys.exit(int(spent > LONGEST))


def _write(count: int, size: int, *folders: Path) -> None:
    """Pairs of smooth fields with a grain of their own: about as hard to decode as photographs."""
    for name, rows in batches(count, BATCH):
        files: list[dict[str, bytes]] = [{} for _ in folders]
        for index in rows:
            draw = numpy_generator(0, "bench_paired", index)
            coarse = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.int16)
            for own in files:
                grained = np.clip(smooth + draw.integers(-4, 5, smooth.shape), 0, 255).astype(np.uint8)
                own[image_path(Path(), index).as_posix()] = png_bytes(Image.fromarray(grained))
        for folder, own in zip(folders, files, strict=True):
            write_item(folder, name, own, {"prompts": [[str(index), ""] for index in rows]})


if __name__ == "__main__":
    run_script(main)
