"""What raters' files say: shares with intervals, tests, strengths, agreement, and who was left out.

    python scripts/score_votes.py results/votes/tiny_trellis3-tiny_rtn4-tiny/key.json ballots/*.json [--skip-faulty]

Writes score.json, score.md, human_preference.csv and .json beside the key; docs/human-preference.md explains them.
"""

import argparse
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

import pandas as pd

from vqdm.errors import UserError
from vqdm.report.votes.ballots import read_ballots, read_key
from vqdm.report.votes.score import preference_rows, score
from vqdm.report.votes.text import to_markdown
from vqdm.runs.files import atomic_write, make_newest, write_json

COLUMNS = ["left", "right", "preference_for_left_percent", "low", "high", "n_votes", "n_raters", "n_prompts"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("key", type=Path, help="key.json of the study")
    parser.add_argument("ballots", type=Path, nargs="+", help="the raters' JSON files")
    parser.add_argument("--skip-faulty", action="store_true", help="leave faulty files out, and say which")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--output", type=Path, help="folder to write to (default: the key's)")
    options = parser.parse_args()
    try:
        key = read_key(options.key)
        ballots, left_out = read_ballots(options.ballots, key, skip_faulty=options.skip_faulty)
        result = score(key, ballots, left_out, seed=options.seed)
        write(options.output or options.key.parent, result)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(to_markdown(result))


def write(folder: Path, result: dict) -> None:
    rows = preference_rows(result)
    write_json(folder / "score.json", result)
    atomic_write(folder / "score.md", to_markdown(result).encode())
    write_json(folder / "human_preference.json", rows)
    make_newest(folder / "human_preference.json", folder.parent.glob("*/human_preference.json"))
    atomic_write(folder / "human_preference.csv", pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False).encode())


if __name__ == "__main__":
    run_script(main)
