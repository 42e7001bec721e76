"""Small studies for the tests of votes: image sets on disk as runs leave them, and raters' files."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from vqdm.report.votes.ballots import FORMAT, Key
from vqdm.report.votes.study import mirrored
from vqdm.runs.items import write_item
from vqdm.runs.store import Store
from vqdm.stages.layout import image_path

CAPTIONS = [f"a caption of number {i}" for i in range(12)]


def write_run(
    results: Path, name: str, *, captions=CAPTIONS, copies=1, seed=0, noise=0.0, size=32, model="tiny", method=None
):
    """A run record with its images: smooth pictures, grainy by `noise`, with text in their metadata."""
    directory = results / "stages" / "generate" / f"images-{name}"
    generator = np.random.default_rng(sum(name.encode()))
    files, prompts = {}, []
    for index in range(len(captions) * copies):
        prompt = index // copies
        slope = np.linspace(40 + 10 * (prompt % 12), 200, size)[:, None, None] + np.zeros((size, size, 3))
        pixels = np.clip(slope + noise * generator.normal(size=slope.shape), 0, 255).astype(np.uint8)
        text = PngImagePlugin.PngInfo()
        text.add_text("method", f"secret-{name}")
        path = image_path(Path(), index)
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(directory / path, pnginfo=text)
        files[path.as_posix()] = (directory / path).read_bytes()
        prompts.append([f"prompt-{prompt:03d}", captions[prompt]])
    write_item(directory, "000000", files, {"prompts": prompts, "seed": seed})
    payload = {
        "fingerprint": "0" * 64,
        "method": method or f"method of {name}",
        "model": model,
        "stages": [directory],
        "directories": {"generate": directory.relative_to(results).as_posix()},
        "bits": {"bits_per_weight": 3.0},
    }
    Store(results).record_run(name, payload)
    return directory


def ballot(key: Key, rater: str, prefer, *, ms=2000, page=1) -> dict:
    """What the page saves. `prefer(trial)`: "left", "tie" or "right" of the sides as the key lists them."""
    flip = mirrored(rater)
    swap = {"left": "right", "right": "left", "tie": "tie"}
    trials = [trial for trial in key.trials.values() if trial.page == page]
    votes = []
    for trial in reversed(trials) if flip else trials:
        choice = prefer(trial)
        votes.append({"pair": trial.pair, "choice": swap[choice] if flip else choice, "ms": ms})
    return {"format": FORMAT, "study": key.study, "page": page, "rater": rater, "mirrored": flip, "votes": votes}


def write_ballot(folder: Path, content, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path
