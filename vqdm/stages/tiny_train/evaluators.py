"""Train a world's two evaluators: an attribute network and an open_clip model.

They see only renders: scenes from a seed of their own, unseen pairs included (an evaluator must know everything that
could appear), never the scenes of the test captions.
"""

import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F

from vqdm.seeds import seeded_initialisation
from vqdm.stages.tiny_train.loop import fast_precision, fit, plain_attention
from vqdm.tiny.attributes import AttributeNet, targets_of
from vqdm.tiny.clip import CLIP_CONFIGS, clip_tokens
from vqdm.tiny.data import SceneSet


def _roughen(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add a little noise and change contrast, so that small decoder artefacts do not count as attributes."""
    strength = 0.08 * torch.rand(len(images), 1, 1, 1, generator=generator, device="cpu")
    contrast = 1 + 0.1 * (2 * torch.rand(len(images), 1, 1, 1, generator=generator, device="cpu") - 1)
    return images * contrast + strength * torch.randn(images.shape, generator=generator, device="cpu")


def train_attribute_net(scenes: SceneSet, *, directory: Path, steps: int, batch_size: int, seed: int) -> AttributeNet:
    with seeded_initialisation(seed, "attribute_net"):
        net = AttributeNet(scenes.world)
    targets = targets_of(scenes.scenes, world=scenes.world)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        rows = scenes.pick(batch_size, generator)
        images = _roughen(scenes.images(rows), generator)
        with fast_precision():
            logits = net.logits(net(images))
        return sum(F.cross_entropy(value.float(), targets[name][rows]) for name, value in logits.items())

    average = fit(
        net,
        loss_of,
        purpose="attribute_net",
        directory=directory,
        steps=steps,
        learning_rate_peak=2e-3,
        seed=seed,
        weight_decay=0.01,
        average_decay=0.99,
    )
    net.load_state_dict(average)
    return net.eval().requires_grad_(False)


def train_clip(scenes: SceneSet, tokenizer, *, directory: Path, steps: int, batch_size: int, seed: int):
    """Train an open_clip model with our own config on captions and renders."""
    config_dir = directory / "open_clip_config"
    config_dir.mkdir(parents=True, exist_ok=True)
    name = f"vqdm-{scenes.world.name}"
    (config_dir / f"{name}.json").write_text(json.dumps(CLIP_CONFIGS[name]))
    open_clip.add_model_config(config_dir)
    with seeded_initialisation(seed, "clip"):
        model = open_clip.create_model(name)
    tokens = clip_tokens(tokenizer, scenes.captions, length=scenes.world.max_tokens)
    targets = torch.arange(batch_size, device="cpu")

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        rows = scenes.pick(batch_size, generator)
        images = _roughen(scenes.images(rows), generator)
        with fast_precision(), plain_attention(scenes.world):
            seen, read, scale = model(images, tokens[rows])
        logits = seen.float() @ read.float().T * scale
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    average = fit(
        model,
        loss_of,
        purpose="clip",
        directory=directory,
        steps=steps,
        learning_rate_peak=1e-3,
        seed=seed,
        weight_decay=0.01,
        average_decay=0.99,
    )
    model.load_state_dict(average, strict=False)
    return model.eval().requires_grad_(False)
