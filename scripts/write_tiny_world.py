"""Write scenes of a world as pictures and official COCO annotations, to read with any COCO loader.

python scripts/write_tiny_world.py DIRECTORY [--split test] [--n 2000] [--seed 0] [--world small]
"""

import argparse
from pathlib import Path

from vqdm.runs.command_line import run_script

from vqdm.tiny.data import write_coco
from vqdm.tiny.scenes import SPLITS
from vqdm.tiny.worlds import WORLDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", choices=WORLDS, default="tiny")
    options = parser.parse_args()
    world = WORLDS[options.world]
    print(write_coco(options.directory, seed=options.seed, split=options.split, n=options.n, world=world))


if __name__ == "__main__":
    run_script(main)
