"""A search for where a caption's colour sits: one group of layers acts as for another caption, the picture shows which.

Two captions differ in one colour. From the same noise the model samples with the second one while one group's outputs,
at every step, are those of a run with the first: causal mediation with restored activations (Meng et al.,
arXiv 2202.05262; for diffusion Basu et al., arXiv 2310.13730). Every group restored would be the first run itself, none
is the second.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from vqdm.metrics.probes.drawn import Drawn
from vqdm.metrics.probes.edits import draw_edit
from vqdm.tiny.captions import requested
from vqdm.tiny.world import World

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
GROUPS = {  # {group: (parts of the pipeline, names of their layers)}; each layer adds to its part's hidden state
    "keys": (("unet",), r".*attn2\.to_[kv]"),
    "keys_down": (("unet",), r"down_blocks\..*attn2\.to_[kv]"),
    "keys_mid": (("unet",), r"mid_block\..*attn2\.to_[kv]"),
    "keys_up": (("unet",), r"up_blocks\..*attn2\.to_[kv]"),
    "pooled": (("unet",), r"add_embedding"),
    "self": (("unet",), r".*attn1"),
    "feed": (("unet",), r".*transformer_blocks\.\d+\.ff"),
    "blocks": (("unet",), r".*resnets\.\d+\.conv2"),
    "words": (TEXT_ENCODERS, r".*token_embedding"),
    "text_first": (TEXT_ENCODERS, r".*layers\.0\.self_attn"),
    "text_attention": (TEXT_ENCODERS, r".*layers\.\d+\.self_attn"),
    "text_mlp": (TEXT_ENCODERS, r".*layers\.\d+\.mlp"),
}


class Places:
    """Extractor of a model: columns {place_…} with a row for each prompt of its world.

    evaluators: the directory of the world's attribute network. guidance: that of the model's own sampler.
    """

    def __init__(self, pipeline, world: World, evaluators: Path, *, guidance: float):
        self.drawn = Drawn(pipeline, world, evaluators, family="places", guidance=guidance)
        self.groups = {f"place_{name}": layers_of(pipeline, name) for name in GROUPS}

    @torch.no_grad()
    def columns(self, prompts: list[list[str]]) -> dict[str, Tensor]:
        """Columns of prompts, each an id such as test-000017 and its caption."""
        edits = [draw_edit(name, caption, self.drawn.world) for name, caption in prompts]
        groups = {"place_said": [], "place_none": [], **self.groups}
        captions = [edit.caption for edit in edits] + [edit.asked for edit in edits] * (len(groups) - 1)
        with restored(list(groups.values()), pictures=len(edits)):
            pictures = self.drawn.pictures(captions, [name for name, _ in prompts] * len(groups))
        things = [requested(edit.caption, world=self.drawn.world).things[edit.slot] for edit in edits]
        shown = self.drawn.shows(pictures, things * len(groups))
        return dict(zip(groups, shown.chunk(len(groups)), strict=True))


def layers_of(pipeline, group: str) -> list[nn.Module]:
    """The layers of a group of GROUPS."""
    parts, pattern = GROUPS[group]
    modules = (pair for part in parts for pair in getattr(pipeline, part).named_modules())
    return [module for name, module in modules if re.fullmatch(pattern, name)]


@contextlib.contextmanager
def restored(groups: list[list[nn.Module]], *, pictures: int) -> Iterator[None]:
    """Context in which run i of a batch has, in the layers of group i, the outputs of run 0.

    A batch is run after run, each of the same pictures; under guidance two such batches stand one after the other.
    """

    def restore(run: int):
        def hook(layer, inputs, output):
            first, *others = output if isinstance(output, tuple) else (output,)  # attention in transformers: a tuple
            runs = first.unflatten(0, (-1, len(groups), pictures)).clone()
            runs[:, run] = runs[:, 0]
            found = runs.flatten(0, 2)
            return (found, *others) if isinstance(output, tuple) else found

        return hook

    hooks = [layer.register_forward_hook(restore(run)) for run, layers in enumerate(groups) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
