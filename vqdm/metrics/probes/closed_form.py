"""An edit of what a U-Net makes of text, in closed form and as a LoRA beside weights of any kind.

Text states x of some captions should act as those x* of others, and states k of further captions as before. For every
layer W that reads them, this is the ridge regression (as Unified Concept Editing's)

    W' = W (I + D),   D = Σ (x* − x) xᵀ (λ I + Σ x xᵀ + Σ k kᵀ)⁻¹,

so that one D of low rank, from the text alone, serves the keys and values of all cross-attentions, in full precision or
in codes; another one serves the layer of the pooled text.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqdm.metrics.probes.asked import Asked

RIDGE = 1.0  # λ
ENCODED = 256  # captions at once
Adapter = tuple[nn.Linear, Tensor, Tensor]  # (layer, A [r, in], B [out, r]): B A x is added to its output


@dataclass(frozen=True)
class Rewriting:
    """Captions, the ones that each of them is to act as, and captions that are to act as before."""

    captions: list[str]
    instead: list[str]
    kept: list[str]


def ridge(old: Tensor, new: Tensor, kept: Tensor, *, penalty: float) -> Tensor:
    """D of the module's docstring, float64 [d, d], from rows of states x, x* [n, d] and k [m, d]."""
    old, new, kept = (rows.double().flatten(0, -2) for rows in (old, new, kept))
    gram = old.T @ old + kept.T @ kept + penalty * torch.eye(old.shape[1], dtype=old.dtype, device=old.device)
    return torch.linalg.solve(gram, old.T @ (new - old)).T  # gram is symmetric


def factors(change: Tensor, *, power: float) -> tuple[Tensor, Tensor]:
    """left [d, r] and right [r, d] of the smallest rank whose product keeps this share of a matrix's power."""
    left, values, right = torch.linalg.svd(change)
    share = values.square().cumsum(0) / values.square().sum()
    rank = int((share < power).sum()) + 1
    return left[:, :rank] * values[:rank], right[:rank]


@torch.no_grad()
def changes_of_states(asked: Asked, rewriting: Rewriting, *, penalty: float = RIDGE) -> tuple[Tensor, Tensor]:
    """D of the module's docstring for the states of tokens and for the pooled ones."""

    def states(captions: list[str]) -> tuple[Tensor, Tensor]:
        found = [asked.states(captions[start : start + ENCODED]) for start in range(0, len(captions), ENCODED)]
        tokens, pooled = (torch.cat(rows) for rows in zip(*found, strict=True))
        return tokens, pooled

    found = [states(captions) for captions in (rewriting.captions, rewriting.instead, rewriting.kept)]
    of_tokens, of_pooled = (ridge(*rows, penalty=penalty) for rows in zip(*found, strict=True))
    return of_tokens, of_pooled


def reading_layers(unet: nn.Module) -> dict[str, tuple[nn.Linear, bool]]:
    """{name: (layer, whether it reads the pooled text)} of SDXL's U-Net: keys and values of the other text's states."""
    keys = {name: (layer, False) for name, layer in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    return keys | {"add_embedding.linear_1": (unet.add_embedding.linear_1, True)}


@torch.no_grad()
def changes_of_weights(unet: nn.Module, of_tokens: Tensor, of_pooled: Tensor) -> dict[str, Tensor]:
    """ΔW = W D of every layer that reads text, fp32 [out, in] on the CPU, by its name in the U-Net."""
    found = {}
    for name, (layer, pooled) in reading_layers(unet).items():
        change = of_pooled if pooled else of_tokens
        _, down, up = adapter(layer, change, torch.eye(len(change), dtype=change.dtype, device=change.device))
        found[name] = (up.float() @ down.float()).cpu()
    return found


def rank_with(changes: Mapping[str, Tensor], *, power: float) -> int:
    """The smallest rank at which every matrix keeps this share of its squared singular values."""
    ranks = []
    for change in changes.values():
        squares = torch.linalg.svdvals(change.double()).square().cumsum(0)
        ranks.append(1 + int((squares < power * squares[-1]).sum()))
    return max(ranks)


def low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] whose product is nearest to a matrix; zeros where it has no more singular values.

    All LoRAs of a file have one rank, since loaders scale a layer of another rank than most.
    """
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    lacking = max(0, rank - len(values))
    down = nn.functional.pad(right[:rank], (0, 0, 0, lacking))
    return down, nn.functional.pad(left[:, :rank] * values[:rank], (0, lacking))


def lora_layers(changes: Mapping[str, Tensor], *, rank: int) -> dict[str, Tensor]:
    """The LoRA nearest to a U-Net's changes, for `save_lora_weights`, in fp16."""
    layers = {}
    for name, change in changes.items():
        down, up = low_rank(change, rank)
        layers |= {f"{name}.lora_A.weight": down.half().contiguous(), f"{name}.lora_B.weight": up.half().contiguous()}
    return layers


def adapter(layer: nn.Linear, left: Tensor, right: Tensor) -> Adapter:
    """A = right and B = W · left, by asking the layer, whose weight may be codes.

    Inputs beyond the text's are left alone.
    """
    beyond = layer.in_features - len(left)
    left, right = (torch.nn.functional.pad(rows.float(), (0, beyond)) for rows in (left.T, right))
    asked = left.to(layer.weight.device, layer.weight.dtype)
    return layer, right.to(asked), (layer(asked) - layer(torch.zeros_like(asked))).T.contiguous()


@contextlib.contextmanager
def beside(adapters: list[Adapter]) -> Iterator[None]:
    """Context in which every layer's output has its adapter's added."""

    def add(down: Tensor, up: Tensor):
        return lambda layer, inputs, output: output + inputs[0] @ down.T @ up.T

    hooks = [layer.register_forward_hook(add(down, up)) for layer, down, up in adapters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
