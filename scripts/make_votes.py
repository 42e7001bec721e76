"""A page for blind votes between two or more runs of the same captions and noise, and the key to it.

    python scripts/make_votes.py tiny_trellis3 tiny_rtn4 --n 32
    python scripts/make_votes.py a b c --pairs a:b a:c --model sdxl --size 768 --quality 95 --pages 8

Writes results/votes/<study>/votes-<id>.html for raters and key.json, which they must not see: docs/human-preference.md.
"""

import argparse
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

from vqdm.errors import UserError
from vqdm.report.votes.images import chosen_images, image_set
from vqdm.report.votes.page import KEY, write_study
from vqdm.report.votes.study import Protocol, comparisons_of, draw_trials
from vqdm.runs.provenance import git_state
from vqdm.runs.texts import check_file_name, file_name_of


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs",
        nargs="+",
        help="names of runs, as in results/runs; attention checks show the first, such as full precision",
    )
    parser.add_argument("--pairs", nargs="+", metavar="ONE:OTHER", help="what is compared (default: every two runs)")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--n", type=int, help="prompts, from the first (default: all)")
    parser.add_argument("--images-per-prompt", type=int, help="(default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of order, sides and checks; one that raters do not know")
    parser.add_argument("--checks", type=int, default=2, help="attention checks of either kind per page (default: 2)")
    parser.add_argument("--pages", type=int, default=1, help="files that the pairs are dealt to (default: 1)")
    parser.add_argument("--size", type=int, help="pixels of the longer side (default: as they are)")
    parser.add_argument("--quality", type=int, help="JPEG of this quality, for large studies (default: PNG, lossless)")
    parser.add_argument("--study", help="name of its folder (default: the runs' names)")
    parser.add_argument("--results", type=Path, default=Path("results"))
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """What argparse lets through and makes no sense."""
    for name, least in (("n", 1), ("images_per_prompt", 1), ("checks", 0), ("pages", 1), ("size", 16), ("quality", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if options.quality is not None and options.quality > 100:
        raise UserError(f"--quality {options.quality} must be 1 to 100")
    if options.study is not None:
        check_file_name("--study", options.study)


def make(options: argparse.Namespace) -> list[Path]:
    check(options)
    comparisons = comparisons_of(options.runs, options.pairs)
    sets = [image_set(options.results, name, options.model) for name in options.runs]
    images = chosen_images(sets, n=options.n, per_prompt=options.images_per_prompt)
    trials = draw_trials(
        comparisons, images, seed=options.seed, pages=options.pages, checks=options.checks, original=options.runs[0]
    )
    directory = options.results / "votes" / (options.study or file_name_of("-".join([*options.runs, options.model])))
    return write_study(
        directory,
        trials,
        {own.system: own for own in sets},
        protocol=Protocol(),
        size=options.size,
        quality=options.quality,
        seed=options.seed,
        about={"comparisons": comparisons, **git_state()},
    )


def main() -> None:
    try:
        pages = make(parse())
    except UserError as error:
        sys.exit(f"error: {error}")
    for page in pages:
        print(f"for raters: {page} ({page.stat().st_size / 2**20:.1f} MiB)")
    print(f"keep to yourself: {pages[0].parent / KEY}")


if __name__ == "__main__":
    run_script(main)
