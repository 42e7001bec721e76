"""Statistics of real images for FID, KID and CMMD: our own directories, or a published .npz.

A directory, as `scripts/make_reference_stats.py` writes it, holds `<family>.safetensors` (mean, covariance, features)
and `reference.json`, which names the images and the weights. A .npz holds `mu` and `sigma` without saying what they
are: the protocol then names the file. Imports no torch until something is loaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from vqdm.errors import UserError
from vqdm.metrics.families import FAMILIES
from vqdm.metrics.sources import check_whole
from vqdm.runs.identity import file_identity, files_identity

ABOUT = "reference.json"
SHAPES = {"mean": [2048], "covariance": [2048, 2048]}  # for Inception's pool features
KEYS = {"mu": "mean", "sigma": "covariance"}  # keys in a .npz, as pytorch-fid and published statistics name them


@dataclass(frozen=True)
class Reference:
    """A reference: its path and identity. `about`: the content of a directory's reference.json."""

    path: Path
    sha256: str
    about: dict | None

    def serves(self, family: str) -> bool:
        """True if it holds anything for a family; a .npz is for Inception's features."""
        return family in self.about["families"] if self.about else family in ("fid_paper", "fid_standard")

    def protocol(self, family: str) -> dict:
        """Description of the reference for a metric's protocol."""
        if self.about is None:
            return {
                "reference": self.path.name,
                "reference_sha256": self.sha256,
                "reference_images": "not stated in the file",
            }
        return {
            "reference": self.about["name"],
            "reference_images": self.about["images"],
            "reference_images_sha256": self.about["images_sha256"],
            "reference_sha256": self.sha256,
        }

    def check_weights(self, family: str, weights: list[str]) -> None:
        """Raise UserError if it was made with other weights than those the images are looked at with."""
        if self.about is None or not self.serves(family):
            return
        made = self.about["families"][family]
        if made["weights_sha256"] != weights or made["version"] != FAMILIES[family].version:
            raise UserError(
                f"{self.path}: its {family} statistics were made with other weights or by another version; make them "
                f"again with scripts/make_reference_stats.py"
            )

    def load(self, family: str) -> dict:
        """Load {"mean" [d], "covariance" [d, d], "features" [n, d] (not from a .npz)} as tensors."""
        if self.about is None:
            import torch

            return {name: torch.from_numpy(array) for name, array in _read_npz(self.path).items()}
        from safetensors.torch import load_file

        return load_file(self.path / f"{family}.safetensors")


def find_reference(path: str | None, *, cache: Path) -> Reference | None:
    """The reference named by `evaluate.reference`, if any.

    UserError if it is not one, before images are made for it.
    """
    if path is None:
        return None
    place = Path(path)
    if place.is_file() and place.suffix == ".npz":
        _read_npz(place)
        return Reference(place, file_identity(place, cache), None)
    try:
        about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
        known = {"name", "images", "images_sha256", "families"} <= set(about)
    except (OSError, ValueError, TypeError):
        known = False
    if not known:
        raise UserError(
            f"evaluate.reference={path} is neither a directory of scripts/make_reference_stats.py nor a .npz "
            "file with mu and sigma; make one, or leave it out"
        )
    if absent := [family for family in about["families"] if not (place / f"{family}.safetensors").is_file()]:
        raise UserError(f"{place}: {absent[0]}.safetensors is missing; copy or make the reference again")
    for family in about["families"]:
        check_whole(place / f"{family}.safetensors")
    return Reference(place, files_identity(place, cache), about)


def check_npz(path: Path) -> None:
    """Raise UserError unless a file holds mu and sigma of Inception's features."""
    _read_npz(path)


def _read_npz(path: Path) -> dict:
    """Read {"mean", "covariance"} in float64. Arrays only: a file that would have to be unpickled is refused."""
    import numpy as np

    cure = "give statistics with mu [2048] and sigma [2048, 2048]"
    try:
        with np.load(path, allow_pickle=False) as content:
            if absent := sorted(set(KEYS) - set(content.files)):
                raise UserError(f"{path} has no array {absent[0]}, but {', '.join(content.files)}; {cure}")
            found = {ours: content[theirs].astype(np.float64) for theirs, ours in KEYS.items()}
    except UserError:
        raise
    except Exception as error:  # many kinds, from numpy, zipfile or zlib
        raise UserError(f"{path} is no .npz of plain arrays ({type(error).__name__}); {cure}") from error
    shapes = {ours: list(array.shape) for ours, array in found.items()}
    if shapes != SHAPES:
        raise UserError(f"{path}: mu is {shapes['mean']} and sigma {shapes['covariance']}; {cure}")
    if not all(np.isfinite(array).all() for array in found.values()):
        raise UserError(f"{path}: mu or sigma has values that are no numbers; {cure}")
    return found
