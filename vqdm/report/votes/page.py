"""The rater's page, one HTML file that needs no server and names no method, and the organiser's key."""

import base64
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from vqdm.errors import UserError
from vqdm.report.votes.images import ImageSet, encode, fill_up, trial_images
from vqdm.report.votes.study import Protocol, Trial
from vqdm.runs.files import atomic_write, canonical_json, sha256_file, write_json
from vqdm.seeds import numpy_generator

KEY = "key.json"
HERE = Path(__file__).parent
LARGEST_PAGE = 250 * 2**20  # bytes; browsers read a text of at most 512 MiB
SMALL = 256  # pixels: smaller images are shown with their pixels as squares


def study_id(trials: list[Trial], sets: dict[str, ImageSet], options: dict) -> str:
    """8 hex digits that change with anything a rater sees; runs' names matter only through their images."""
    images = {system: _digest(own, trials) for system, own in sets.items()}
    seen = [
        [t.pair, t.page, t.caption, t.copy, t.check, images.get(t.left, t.left), images.get(t.right, t.right)]
        for t in trials
    ]
    return hashlib.sha256(canonical_json([seen, options])).hexdigest()[:8]


def _digest(own: ImageSet, trials: list[Trial]) -> str:
    shown = sorted({(trial.prompt, trial.copy) for trial in trials})
    return hashlib.sha256("".join(sha256_file(own.path(*image)) for image in shown).encode()).hexdigest()


def write_study(
    directory: Path,
    trials: list[Trial],
    sets: dict[str, ImageSet],
    *,
    protocol: Protocol,
    size: int | None,
    quality: int | None,
    seed: int,
    about: dict,
) -> list[Path]:
    """Write pages and key.json into `directory`; returns the pages.

    The same call writes the same pages again. UserError if another study is there, since its votes need its key.
    """
    options = {"size": size, "quality": quality, "question": protocol.question}
    study = study_id(trials, sets, options)
    _keep_other_study(directory / KEY, study)
    pages = sorted({trial.page for trial in trials})
    files = [directory / f"votes-{study}{f'-{page}' if len(pages) > 1 else ''}.html" for page in pages]
    for page, file in zip(pages, files, strict=True):
        shown = [trial for trial in trials if trial.page == page]
        images = _encoded(shown, sets, size=size, quality=quality, seed=seed)
        content = {"study": study, "page": page, "pages": len(pages), "question": protocol.question}
        html = page_html(content | _payload(shown, images, "png" if quality is None else "jpeg"))
        if len(html) > LARGEST_PAGE:
            raise UserError(
                f"{file.name} would have {len(html) >> 20} MiB, more than a browser takes; give more --pages, "
                "a smaller --size, or --quality 95"
            )
        atomic_write(file, html)
    systems = {name: _about(own) for name, own in sets.items()}
    key = {"study": study, "seed": seed, **about, **options, "protocol": asdict(protocol), "systems": systems}
    write_json(directory / KEY, key | {"trials": [asdict(trial) for trial in trials]})
    return files


def _about(own: ImageSet) -> dict:
    record = own.record
    return {"method": record["method"], "model": record["model"], "bits": record["bits"], "images": own.directory.name}


def _keep_other_study(key: Path, study: str) -> None:
    if not key.is_file():
        return
    try:
        there = json.loads(key.read_bytes())["study"]
    except (ValueError, KeyError, TypeError):
        there = "a damaged one"
    if there != study:
        raise UserError(f"{key} is the key of another study ({there}), and its votes need it; give another --study")


def _encoded(
    shown: list[Trial], sets: dict[str, ImageSet], *, size: int | None, quality: int | None, seed: int
) -> list[bytes]:
    """The images of a page in the order of its trials, left before right, all equally long."""
    files: list[bytes] = []
    for trial in shown:
        pair = trial_images(trial, sets, size=size, generator=numpy_generator(seed, "votes/destroyed", trial.pair))
        files += [encode(image, quality) for image in pair]
    return fill_up(files, numpy_generator(seed, "votes/filling", shown[0].page))


def _payload(shown: list[Trial], images: list[bytes], kind: str) -> dict:
    texts = [base64.b64encode(image).decode() for image in images]
    pairs = [
        {"id": trial.pair, "caption": trial.caption, "left": left, "right": right}
        for trial, left, right in zip(shown, texts[::2], texts[1::2], strict=True)
    ]
    return {"type": f"image/{kind}", "small": SMALL, "pairs": pairs}


def page_html(content: dict) -> bytes:
    """The whole page. Its policy allows this script and style by their hashes, embedded images, and nothing else."""
    style, script = ((HERE / f"page.{end}").read_text(encoding="utf-8") for end in ("css", "js"))
    # no "<" in the data: a caption with </script> would end the block, and the rest would become markup
    data = json.dumps(content, ensure_ascii=True).replace("<", r"\u003c")
    html = (HERE / "page.html").read_text(encoding="utf-8")
    fields = {"style": style, "script": script, "style-hash": _hash(style), "script-hash": _hash(script), "data": data}
    for name, text in fields.items():  # the data comes last, so that text in a caption is not taken for a field
        html = html.replace(f"{{{{{name}}}}}", text)
    return html.encode()


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
