"""Text encoders that have learned to tell captions apart learn to say all that is said of each thing.

Contrastive training leaves a word in the states as far as it tells captions apart: in small, colours took half of what
differs between the last words of things, textures a thousandth, and the denoiser never learned them.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from vqdm.seeds import seeded_initialisation
from vqdm.stages.tiny_train.loop import fast_precision, fit, plain_attention
from vqdm.stages.tiny_train.text import text_states, token_ids
from vqdm.tiny.captions import said_things
from vqdm.tiny.world import World

SHARPNESS = 8.0  # of the logits of words, for states of mean square length 1: so each attribute must move them visibly


class WordHeads(nn.Module):
    """Reads what is said of a thing off the state at its last word, along one direction for every word.

    counts: number of classes by attribute. Directions have length 1, so that no head makes up for a small difference.
    """

    def __init__(self, counts: dict[str, int], width: int):
        super().__init__()
        drawn = {name: torch.randn(count, width, device="cpu") for name, count in counts.items()}
        self.directions = nn.ParameterDict({name: nn.Parameter(rows) for name, rows in drawn.items()})

    def forward(self, states: torch.Tensor, classes: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross entropy over the attributes; states: [things, width]."""
        logits = {name: SHARPNESS * states @ F.normalize(rows, dim=-1).T for name, rows in self.directions.items()}
        return torch.stack([F.cross_entropy(logits[name], classes[name]) for name in logits]).mean()


class SaidThings:
    """Where each caption ends to speak of a thing, and the classes of what it says; `None` is a class of its own."""

    def __init__(self, captions: list[str], world: World):
        values = {
            "shape": world.shapes,
            "colour": (*world.colours,),
            "size": (None, *world.size_words),
            "texture": (None, *world.textures),
        }
        self.counts = {name: len(found) for name, found in values.items()}
        numbers = {name: {value: i for i, value in enumerate(found)} for name, found in values.items()}
        self._of = []
        for caption in captions:
            said = said_things(caption, world=world)
            self._of.append([(place, [numbers[n][getattr(thing, n)] for n in numbers]) for place, thing in said])

    def of(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """(place among the rows, place among the tokens, {attribute: class}) of every thing that the rows speak of."""
        found = [(i, 1 + place, *cls) for i, row in enumerate(rows.tolist()) for place, cls in self._of[row]]
        row, token, *classes = torch.tensor(found, device="cpu").T  # a start token, then one for every word
        return row, token, dict(zip(self.counts, classes, strict=True))


def teach_words(
    tokenizer, text_encoder, text_encoder_2, captions: list[str], *, world: World, directory: Path, steps: int,
    batch_size: int, seed: int,
) -> None:  # fmt: skip
    """Train both encoders on, in place, until the state at the last word of a thing says all that is said of it.

    Every attribute is asked for alike, and a state moves no further from what it was than that takes.
    """
    said, ids = SaidThings(captions, world), token_ids(tokenizer, captions)
    with seeded_initialisation(seed, "words"):
        widths = (text_encoder.config.hidden_size, text_encoder_2.config.hidden_size)
        heads = nn.ModuleList(WordHeads(said.counts, width) for width in widths)
    before = [copy.deepcopy(encoder).eval().requires_grad_(False) for encoder in (text_encoder, text_encoder_2)]
    taught = nn.ModuleDict({"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "heads": heads})
    taught.requires_grad_(True)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(captions), (batch_size,), generator=generator, device="cpu")
        row, token, classes = said.of(rows)
        with fast_precision(), plain_attention(world):
            with torch.no_grad():
                known = [part.float() for part in text_states(*before, ids[rows])]
            found = [part.float() for part in text_states(text_encoder, text_encoder_2, ids[rows])]
        loss = (found[2] - known[2]).square().sum(-1).mean() / known[2].var(0).sum()
        for head, new, old in zip(heads, found, known, strict=False):
            power = old[row, token].var(0).sum()  # mean square length of what differs between things
            moved = (new - old).square().sum(-1) / power
            loss = loss + moved.mean() + moved[row, token].mean()
            loss = loss + head((new[row, token] - old[row, token].mean(0)) / power.sqrt(), classes)
        return loss / 3

    average = fit(
        taught,
        loss_of,
        purpose="words",
        directory=directory,
        steps=steps,
        learning_rate_peak=5e-4,
        seed=seed,
        weight_decay=0.01,
        average_decay=0.99,
    )
    taught.load_state_dict(average, strict=False)
    taught.eval().requires_grad_(False)
