"""Damage saved checkpoints in every way one can think of: each is refused clearly, or loads as it was saved.

python scripts/fuzz_checkpoints.py [--cases 500] [--first 0] [--only 123]

A case is its number: it says which golden checkpoint is damaged, how, and where. What may come of it:
  refused    a UserError of vqdm
  library    an OSError, ValueError or SafetensorError that names the file, a tensor or a key
  diffusers  any error, or a warning with layers left empty, after damage to config.json or the index of shards that
             diffusers met before it asked vqdm for anything
  same       a model whose tensors, decoded weights and options are those of the undamaged one
Anything else, more than 20 seconds or 256 MiB included, is a finding. Prints a table of outcomes by mutation and every
finding; ends with 1 if there is one.
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
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from checkpoint_damage import CONFIG, GOLDEN, MUTATIONS, WEIGHTS
from safetensors import SafetensorError

import vqdm  # noqa: F401  (before diffusers: the torchvision cure)
from vqdm.errors import UserError
from vqdm.weights.layers import quantized_layers

OUTCOMES = ("refused", "library", "diffusers", "same", "finding")
SECONDS, MEBIBYTES = 20, 256


class TooLong(BaseException):
    """Of a case that would not end; a BaseException, so that nothing on the way takes it for its own."""


_originals: dict[str, torch.nn.Module] = {}


def load(folder: Path) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder)


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


def judge(folder: Path, *, of_config: bool) -> tuple[str, str]:
    """(outcome, what was said)."""
    expected, before = original(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with limited(SECONDS):
            model = load(folder)
            found = difference(model, expected)
    except TooLong:
        return "finding", f"took more than {SECONDS} s"
    except Exception as error:
        outcome, said = _judged_error(error, folder, of_config=of_config), f"{type(error).__name__}: {error}"
    else:
        outcome, said = "same" if found is None else "finding", found or ""
        if of_config and not hasattr(model, "hf_quantizer"):
            outcome, said = "diffusers", "config.json says nothing of quantization: a warning, and layers left empty"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return ("finding", f"took {grown:.0f} MiB; {said}") if grown > MEBIBYTES else (outcome, said)


def _judged_error(error: Exception, folder: Path, *, of_config: bool) -> str:
    if isinstance(error, UserError):
        return "refused" if "\n" not in str(error) else "finding"
    files = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
    asked = any("vqdm" in parts for parts in files)
    named = (str(folder), "safetensors", "quant_method", "quantization", *original(folder).state_dict())
    if isinstance(error, OSError | ValueError | SafetensorError) and any(name in str(error) for name in named):
        return "library"
    return "diffusers" if of_config and not asked else "finding"


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
        of_config = (folder / CONFIG).read_bytes() != (source / CONFIG).read_bytes() or "index" in done
        outcome, said = judge(folder, of_config=of_config)
    finally:
        shutil.rmtree(folder)
    return mutate.__name__, outcome, f"{source.name}, {done} → {said}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and the progress bars of diffusers, which damaged files cause by the hundred."""
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
    main()
