"""A network that reads the attributes of a picture of a world, and their agreement with the caption.

`AttributeNet` is the worlds' evaluator: its features serve FID and KID, its heads serve caption fidelity.
It takes part in no training loss of the denoiser, the VAE or the text encoders.
"""

import dataclasses
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from vqdm.tiny.captions import Request, RequestedThing
from vqdm.tiny.scenes import TINY
from vqdm.tiny.world import Scene, World

WIDTHS = {"tiny": (32, 48, 96, 128), "small": (32, 48, 96, 128, 160)}  # channels; each but the first halves the size
NUM_FEATURES = {"tiny": 64, "small": 96}
KINDS = ("count", "relation", "shape", "colour", "size", "background", "pattern")  # those of every world


def values_of(world: World) -> dict[str, tuple[str, ...]]:
    """{attribute: its values} of a picture; things are counted as a scene does: the left or upper one is number 0."""
    things = {f"{kind}{slot}": v for slot in range(world.most_things) for kind, v in world.thing_kinds.items()}
    ground = {"layout": world.layouts, "background": tuple(world.backgrounds), "pattern": world.patterns}
    return ground | things


def kinds_of(world: World) -> tuple[str, ...]:
    """The kinds of attributes that a caption can ask for."""
    return (*KINDS, *(kind for kind in world.thing_kinds if kind not in KINDS))


class _Residual(nn.Module):
    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(inner, outer, 3, 2, 1), nn.Conv2d(outer, outer, 3, 1, 1)
        self.norm1, self.norm2 = nn.GroupNorm(8, outer), nn.GroupNorm(8, outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.norm1(self.first(x)))
        return x + F.silu(self.norm2(self.second(x)))


class AttributeNet(nn.Module):
    """float [n, 3, size, size] in [-1, 1] -> features [n, 64]; `heads` maps features to logits by attribute.

    The features are 64 in tiny (32×32 pixels), 96 in small (64×64).
    """

    def __init__(self, world: World = TINY):
        super().__init__()
        widths, features = WIDTHS[world.name], NUM_FEATURES[world.name]
        blocks = (_Residual(inner, outer) for inner, outer in itertools.pairwise(widths))
        self.body = nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1), nn.SiLU(), *blocks)
        self.to_features = nn.Linear(widths[-1] * 16, features)
        self.heads = nn.ModuleDict({name: nn.Linear(features, len(v)) for name, v in values_of(world).items()})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.silu(self.to_features(self.body(images).flatten(1)))

    def logits(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: head(features) for name, head in self.heads.items()}


@dataclasses.dataclass(frozen=True)
class Seen:
    """The attributes the network sees: things are (shape, colour, size) and, where the world has them, texture.

    The first thing is left of or above the second.
    """

    layout: str
    things: tuple[tuple[str, ...], ...]
    background: str
    pattern: str


@torch.no_grad()
def labels(net: AttributeNet, features: torch.Tensor) -> torch.Tensor:
    """Most probable value of each attribute for each row of features: int64 [n, attributes], as in `values_of`."""
    return torch.stack([logits.argmax(-1) for logits in net.logits(features).values()], dim=1)


def seen_by(found: torch.Tensor, *, world: World = TINY) -> list[Seen]:
    """The indices of `labels` turned into words."""
    values = values_of(world)
    counts = {"single": 1} | {layout: len(order) for layout, order in world.readings.values()}
    pictures = []
    for row in found.tolist():
        named = {name: words[i] for (name, words), i in zip(values.items(), row, strict=True)}
        things = [tuple(named[f"{kind}{slot}"] for kind in world.thing_kinds) for slot in range(world.most_things)]
        layout = named["layout"]
        pictures.append(Seen(layout, tuple(things[: counts[layout]]), named["background"], named["pattern"]))
    return pictures


def look(net: AttributeNet, features: torch.Tensor, *, world: World = TINY) -> list[Seen]:
    """Most probable attributes for each row of features."""
    return seen_by(labels(net, features), world=world)


def as_seen(scene: Scene, *, world: World = TINY) -> Seen:
    """The true attributes of a scene, in the form in which the network reports what it sees."""
    things = tuple(tuple(getattr(thing, kind) for kind in world.thing_kinds) for thing in scene.things)
    return Seen(scene.layout, things, scene.background, scene.pattern)


def targets_of(scenes: list[Scene], *, world: World = TINY) -> dict[str, torch.Tensor]:
    """Class indices by attribute, -100 (ignored by cross entropy) where there is no such thing."""
    values = values_of(world)
    columns: dict[str, list[int]] = {name: [] for name in values}
    for scene in scenes:
        for name in ("layout", "background", "pattern"):
            columns[name].append(values[name].index(getattr(scene, name)))
        for slot, kind in itertools.product(range(world.most_things), world.thing_kinds):
            name = f"{kind}{slot}"
            there = slot < len(scene.things)
            columns[name].append(values[name].index(getattr(scene.things[slot], kind)) if there else -100)
    return {name: torch.tensor(column, device="cpu") for name, column in columns.items()}


def _agreements(wanted: RequestedThing, seen: tuple | None, world: World) -> list[tuple[str, bool]]:
    """(kind, whether it is as asked) of each attribute asked of a thing; None, a missing thing, agrees in nothing."""
    asked = ((place, kind, getattr(wanted, kind)) for place, kind in enumerate(world.thing_kinds))
    return [(kind, seen is not None and seen[place] == value) for place, kind, value in asked if value is not None]


def fidelity(request: Request, seen: Seen, *, world: World = TINY) -> dict[str, tuple[int, int]]:
    """(found, asked) for each kind of attribute. Things are paired the best way: a swap costs the relation only."""
    count = len(request.things)
    padded = (*seen.things, *[None] * (count - len(seen.things)))
    best, in_place = None, True
    for place, order in enumerate(itertools.permutations(padded, count)):  # the first is in the order of the scene
        pairs = zip(request.things, order, strict=True)
        found = [agreement for wanted, thing in pairs for agreement in _agreements(wanted, thing, world)]
        if best is None or sum(ok for _, ok in found) > sum(ok for _, ok in best):
            best, in_place = found, place == 0
    results = [("count", count == len(seen.things)), *best]
    if request.layout != "single":
        results.append(("relation", seen.layout == request.layout and in_place))
    for kind in ("background", "pattern"):
        if getattr(request, kind) is not None:
            results.append((kind, getattr(request, kind) == getattr(seen, kind)))
    tally = {kind: (0, 0) for kind in kinds_of(world)}
    for kind, ok in results:
        found, asked = tally[kind]
        tally[kind] = (found + ok, asked + 1)
    return tally
