"""Captions of MS-COCO, one per image: official JSON (2014, 2017) and Karpathy's split (dataset_coco.json).

Both rules choose the same caption for an image, since Karpathy's sentids are COCO's annotation ids.
"""

from collections.abc import Iterable
from typing import Any

from vqdm.prompts.tables import Row, no_column
from vqdm.prompts.text_files import fault, is_integer, listed, parse_json

AGAIN = "mend or fetch it again"


def read_coco(text: str, name: str, *, column: str | None, split: str) -> tuple[list[Row], str]:
    """Read the captions; `split` is for Karpathy's file only, as the official format has a file for each split."""
    no_column(name, column, "a COCO .json file")
    document = parse_json(text, name)
    return _karpathy(document, name, split) if _is_karpathy(document) else _official(document, name)


def _objects(document: Any, key: str, name: str) -> list[dict]:
    found = document.get(key) if isinstance(document, dict) else None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        cure = "give COCO captions in the official format {info, images, annotations}, or a .jsonl file"
        raise fault(name, f"has no list of objects {key!r}", cure)
    return found


def _rule(what: str, without: int) -> str:
    return f"of each image the caption with the lowest {what}" + (
        f", {without} images without a caption" if without else ""
    )


def _refuse_shared(ids: Iterable[int], name: str, what: str) -> None:
    ids = list(ids)
    if len(set(ids)) < len(ids):
        raise fault(name, what, AGAIN)


def _check_annotation(item: dict, name: str) -> None:
    if not is_integer(item.get("id")):
        raise fault(name, f"an annotation has no integer id ({str(item)[:100]})", AGAIN)
    if not isinstance(item.get("caption"), str):
        cure = "give a captions file (captions_*.json), not instances or keypoints"
        raise fault(f"{name} annotation {item['id']}", "has no caption", cure)


def _official(document: Any, name: str) -> tuple[list[Row], str]:
    """For each image the annotation with the lowest id, in the order of `images`."""
    annotations = _objects(document, "annotations", name)
    images = _objects(document, "images", name)
    if not all(is_integer(image.get("id")) for image in images):
        raise fault(name, "'images' without unique integer ids", AGAIN)
    _refuse_shared((image["id"] for image in images), name, "'images' without unique integer ids")
    lowest: dict[int, dict | None] = dict.fromkeys(image["id"] for image in images)
    for item in annotations:
        _check_annotation(item, name)
        image = item.get("image_id")
        if not is_integer(image) or image not in lowest:
            raise fault(f"{name} annotation {item['id']}", f"image_id {image!r} is not among 'images'", AGAIN)
        best = lowest[image]
        if best is None or item["id"] < best["id"]:
            lowest[image] = item
    chosen = [(image, lowest[image["id"]]) for image in images if lowest[image["id"]] is not None]
    _refuse_shared((item["id"] for _, item in chosen), name, "annotations that share an id")
    rows = [
        Row(f"{name} annotation {item['id']}", item["caption"], item["id"], image.get("file_name"))
        for image, item in chosen
    ]
    return rows, _rule("id", len(images) - len(rows))


def _is_karpathy(document: Any) -> bool:
    if not isinstance(document, dict) or "annotations" in document or not isinstance(document.get("images"), list):
        return False
    return any(isinstance(image, dict) and {"sentences", "split"} & image.keys() for image in document["images"])


def _sentence(image: dict, where: str) -> dict | None:
    """The image's sentence with the lowest sentid, or None if it has none."""
    sentences = _objects(image, "sentences", where)
    for item in sentences:
        if not is_integer(item.get("sentid")):
            raise fault(where, f"a sentence has no integer sentid ({str(item)[:100]})", AGAIN)
        if not isinstance(item.get("raw"), str):
            raise fault(where, f"sentence {item['sentid']} has no text 'raw'", AGAIN)
    return min(sentences, key=lambda item: item["sentid"], default=None)


def _karpathy(document: dict, name: str, split: str) -> tuple[list[Row], str]:
    """For each image of a split the sentence with the lowest sentid: train (without restval), val, test or restval."""
    images = list(enumerate(_objects(document, "images", name)))
    for number, image in images:
        if not isinstance(image.get("split"), str):
            raise fault(f"{name} image {number}", "has no split", "give Karpathy's dataset_coco.json as published")
    splits = sorted({image["split"] for _, image in images})
    if split not in splits:
        raise fault(name, f"unknown split {split!r}", f"choose one of {listed(splits)}")
    own = [(image, f"{name} image {number}") for number, image in images if image["split"] == split]
    chosen = [(image, _sentence(image, where)) for image, where in own]
    found = [(image, item) for image, item in chosen if item is not None]
    _refuse_shared((item["sentid"] for _, item in found), name, "sentences that share a sentid")
    rows = [
        Row(f"{name} sentence {item['sentid']}", item["raw"], item["sentid"], image.get("filename"))
        for image, item in found
    ]
    return rows, f"split {split}, {_rule('sentid', len(own) - len(rows))}"
