"""Damage saved checkpoints in every way one can think of: each is refused clearly, or loads as it was saved.

python scripts/fuzz_checkpoints.py [--cases 500] [--first 0] [--only 123]

A case is its number: it says which golden checkpoint is damaged, how, and where. It is loaded by vqdm's own loader,
as a run does. What may come of it:
  refused    a UserError of one line that names the folder
  same       a model whose tensors, decoded weights and options are those of the undamaged one
  forged     another model, after damage whose checksums were made to fit: all its numbers, decoded too, are finite
Anything else is a finding: any error of diffusers, safetensors or Python, a model with layers left empty, more than
20 seconds or 256 MiB. Prints a table of outcomes by mutation and every finding; ends with 1 if there is one.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vqdm.runs.command_line import run_script

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from checkpoint_damage import CONFIG, GOLDEN, MUTATIONS, WEIGHTS

import vqdm  # noqa: F401  (before diffusers: the torchvision cure)
from vqdm.errors import UserError
from vqdm.hub.pipelines import load_denoiser
from vqdm.models.finite import fault_of
from vqdm.weights.layers import quantized_layers

OUTCOMES = ("refused", "same", "forged", "finding")
SECONDS, MEBIBYTES, LONGEST = 20, 256, 800


class TooLong(BaseException):
    """Raised for a case that does not end; a BaseException, so that no handler on the way catches it."""


_originals: dict[str, torch.nn.Module] = {}


def load(folder: Path) -> torch.nn.Module:
    return load_denoiser(folder, dtype=torch.float32)


def original(folder: Path) -> torch.nn.Module:
    kind = folder.name
    if kind not in _originals:
        _originals[kind] = load(GOLDEN / kind)
    return _originals[kind]


def difference(model: torch.nn.Module, expected: torch.nn.Module) -> str | None:
    """What is not as it was saved, or None."""
    ours, theirs = model.state_dict(), expected.state_dict()
    if list(ours) != list(theirs):
        return "other tensors"
    for name, tensor in theirs.items():
        if ours[name].device != tensor.device or ours[name].dtype != tensor.dtype or not ours[name].equal(tensor):
            return f"another {name}"
    with torch.no_grad():
        for name, layer in quantized_layers(expected).items():
            if not torch.equal(layer.decoded(torch.float32), model.get_submodule(name).decoded(torch.float32)):
                return f"{name} decodes to something else"
    own = [key for key in expected.config if key != "quantization_config" and not key.startswith("_")]
    changed = [key for key in own if json.dumps(model.config.get(key)) != json.dumps(expected.config[key])]
    return f"other options: {changed}" if changed else None


def finite(model: torch.nn.Module) -> bool:
    """True if every number of a model is finite, including those that its codes decode to."""
    with torch.no_grad():
        decoded = (layer.decoded(torch.float32) for layer in quantized_layers(model).values())
        return all(fault_of(tensor) is None for tensor in (*model.state_dict().values(), *decoded))


def judge(folder: Path, *, forged: bool) -> tuple[str, str]:
    """(outcome, what was said). forged: the checksums were made to fit the damage."""
    expected, before = original(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with limited(SECONDS):
            model = load(folder)
            found = difference(model, expected)
            if found is not None and forged and finite(model):
                return "forged", found
    except TooLong:
        return "finding", f"took more than {SECONDS} s"
    except UserError as error:
        named = str(folder) in str(error) and "\n" not in str(error) and len(str(error)) < LONGEST + len(str(folder))
        outcome, said = "refused" if named else "finding", f"UserError: {error}"
    except Exception as error:
        outcome, said = "finding", f"{type(error).__name__}: {error}"
    else:
        outcome, said = "same" if found is None else "finding", found or ""
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return ("finding", f"took {grown:.0f} MiB; {said}") if grown > MEBIBYTES else (outcome, said)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_case(number: int, directory: Path) -> tuple[str, str, str]:
    """(mutation, outcome, what was done and what was said); leaves nothing in `directory`."""
    kinds = sorted(path for path in GOLDEN.iterdir() if path.is_dir())
    mutate, source = MUTATIONS[number % len(MUTATIONS)], kinds[number // len(MUTATIONS) % len(kinds)]
    folder = directory / source.name
    folder.mkdir()
    try:
        for name in (CONFIG, WEIGHTS):
            (folder / name).write_bytes((source / name).read_bytes())
        done = mutate(folder, random.Random(number))
        outcome, said = judge(folder, forged=mutate.__name__.startswith("forge"))
    finally:
        shutil.rmtree(folder)
    return mutate.__name__, outcome, f"{source.name}, {done} → {said}"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence diffusers' warnings and progress bars, which damaged files cause by the hundred."""
    from diffusers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    arguments = parser.parse_args()
    first, count = (arguments.first, arguments.cases) if arguments.only is None else (arguments.only, 1)
    outcomes: dict[str, Counter] = defaultdict(Counter)
    with quiet(), tempfile.TemporaryDirectory() as directory:
        for number in range(first, first + count):
            mutation, outcome, said = run_case(number, Path(directory))
            outcomes[mutation][outcome] += 1
            if outcome == "finding" or arguments.only is not None:
                print(f"case {number}: {mutation}, {outcome}: {said[:600]}", flush=True)
    print(f"{'':26}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES))
    for mutation in (mutate.__name__ for mutate in MUTATIONS if mutate.__name__ in outcomes):
        print(f"{mutation:26}" + "".join(f"{outcomes[mutation][outcome]:11}" for outcome in OUTCOMES))
    sys.exit(1 if any(counts["finding"] for counts in outcomes.values()) else 0)


if __name__ == "__main__":
    run_script(main)
