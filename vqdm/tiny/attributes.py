"""A network that reads the attributes of a picture of the tiny world, and their agreement with the caption.

`AttributeNet` is the tiny world's evaluator: its 64 features serve FID and KID, its heads serve caption fidelity.
It takes part in no training loss of the denoiser, the VAE or the text encoders.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from vqdm.tiny.captions import Request
from vqdm.tiny.scenes import BACKGROUNDS, COLOURS, LAYOUTS, PATTERNS, RADII, SHAPES, Scene

NUM_FEATURES = 64
VALUES = {
    "layout": LAYOUTS,
    "background": tuple(BACKGROUNDS),
    "pattern": PATTERNS,
    **{
        f"{kind}{slot}": v
        for slot in (0, 1)
        for kind, v in (("shape", SHAPES), ("colour", tuple(COLOURS)), ("size", tuple(RADII)))
    },
}
KINDS = ("count", "relation", "shape", "colour", "size", "background", "pattern")
MISSING = (None, None, None)  # counterpart of a requested thing that is not in the picture: agrees in nothing


class _Residual(nn.Module):
    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(inner, outer, 3, 2, 1), nn.Conv2d(outer, outer, 3, 1, 1)
        self.norm1, self.norm2 = nn.GroupNorm(8, outer), nn.GroupNorm(8, outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.norm1(self.first(x)))
        return x + F.silu(self.norm2(self.second(x)))


class AttributeNet(nn.Module):
    """float [n, 3, 32, 32] in [-1, 1] -> features [n, 64]; `heads` maps features to logits by attribute."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, 1, 1), nn.SiLU(), _Residual(32, 48), _Residual(48, 96), _Residual(96, 128)
        )
        self.to_features = nn.Linear(128 * 16, NUM_FEATURES)
        self.heads = nn.ModuleDict({name: nn.Linear(NUM_FEATURES, len(v)) for name, v in VALUES.items()})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.silu(self.to_features(self.body(images).flatten(1)))

    def logits(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: head(features) for name, head in self.heads.items()}


@dataclasses.dataclass(frozen=True)
class Seen:
    """The attributes the network sees: things are (shape, colour, size); the first is left of or above the second."""

    layout: str
    things: tuple[tuple[str, str, str], ...]
    background: str
    pattern: str


@torch.no_grad()
def labels(net: AttributeNet, features: torch.Tensor) -> torch.Tensor:
    """Most probable value of each attribute for each row of features: int64 [n, attributes], in the order of VALUES."""
    logits = net.logits(features)
    return torch.stack([logits[name].argmax(-1) for name in VALUES], dim=1)


def seen_by(found: torch.Tensor) -> list[Seen]:
    """The indices of `labels` turned into words."""
    columns = zip(VALUES.values(), found.T.tolist(), strict=True)
    named = dict(zip(VALUES, ([values[i] for i in indices] for values, indices in columns), strict=True))
    slots = [list(zip(named[f"shape{s}"], named[f"colour{s}"], named[f"size{s}"], strict=True)) for s in (0, 1)]
    return [
        Seen(layout, (first,) if layout == "single" else (first, second), background, pattern)
        for layout, first, second, background, pattern in zip(
            named["layout"], *slots, named["background"], named["pattern"], strict=True
        )
    ]


def look(net: AttributeNet, features: torch.Tensor) -> list[Seen]:
    """Most probable attributes for each row of features."""
    return seen_by(labels(net, features))


def as_seen(scene: Scene) -> Seen:
    """The true attributes of a scene, in the form in which the network reports what it sees."""
    things = tuple((t.shape, t.colour, t.size) for t in scene.things)
    return Seen(scene.layout, things, scene.background, scene.pattern)


def targets_of(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Class indices by attribute, -100 (ignored by cross entropy) where there is no second thing."""
    columns: dict[str, list[int]] = {name: [] for name in VALUES}
    for scene in map(as_seen, scenes):
        for name in ("layout", "background", "pattern"):
            columns[name].append(VALUES[name].index(getattr(scene, name)))
        for slot in (0, 1):
            for position, kind in enumerate(("shape", "colour", "size")):
                name = f"{kind}{slot}"
                there = slot < len(scene.things)
                columns[name].append(VALUES[name].index(scene.things[slot][position]) if there else -100)
    return {name: torch.tensor(values) for name, values in columns.items()}


def _pairings(request: Request, seen: Seen) -> list[list[tuple]]:
    """Ways to pair the requested things with those seen, the pairing that fits the layout first."""
    if len(request.things) == 1:
        return [[(request.things[0], thing)] for thing in seen.things]
    first, second = seen.things if len(seen.things) == 2 else (*seen.things, MISSING)
    return [list(zip(request.things, order, strict=True)) for order in ((first, second), (second, first))]


def _agreements(pairs: list[tuple]) -> list[tuple[str, bool]]:
    found = []
    for wanted, (shape, colour, size) in pairs:
        found += [("shape", wanted.shape == shape), ("colour", wanted.colour == colour)]
        if wanted.size is not None:
            found.append(("size", wanted.size == size))
    return found


def fidelity(request: Request, seen: Seen) -> dict[str, tuple[int, int]]:
    """(found, asked) for each kind of attribute. Things are paired the best way: a swap costs the relation only."""
    options = _pairings(request, seen)
    scored = [(sum(ok for _, ok in _agreements(pairs)), -order, pairs) for order, pairs in enumerate(options)]
    _, order, pairs = max(scored, key=lambda option: option[:2])
    results = [("count", len(request.things) == len(seen.things)), *_agreements(pairs)]
    if request.layout != "single":
        results.append(("relation", seen.layout == request.layout and order == 0))
    for kind in ("background", "pattern"):
        if getattr(request, kind) is not None:
            results.append((kind, getattr(request, kind) == getattr(seen, kind)))
    tally = {kind: (0, 0) for kind in KINDS}
    for kind, ok in results:
        found, asked = tally[kind]
        tally[kind] = (found + ok, asked + 1)
    return tally
