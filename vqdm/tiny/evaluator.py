"""A world's two evaluation networks applied to images, and the reference to compare with."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from vqdm.tiny.attributes import AttributeNet, labels
from vqdm.tiny.clip import clip_tokens, load_clip
from vqdm.tiny.worlds import world_of


class TinyWorld:
    """Both evaluation networks, run on the CPU."""

    def __init__(self, directory: Path):
        weights = {k: v.float() for k, v in load_file(directory / "attribute_net.safetensors").items()}
        self.world = world_of(sum(name.endswith(".bias") and name.startswith("heads.") for name in weights))
        self.net = AttributeNet(self.world)
        self.net.load_state_dict(weights)
        self.net.eval().requires_grad_(False)
        self.clip, self.tokenizer = load_clip(directory)

    @torch.no_grad()
    def columns(self, images: list[np.ndarray], captions: list[str] | None = None) -> dict[str, torch.Tensor]:
        """Features of images, uint8 [size, size, 3] each, by name.

        {"features": [n, 64], "labels": [n, attributes], "image": unit vectors [n, 64], "cosine": [n] with captions}.
        """
        pixels = to_tensor(np.stack(images))
        features = self.net(pixels)
        seen = self.clip.encode_image(pixels, normalize=True)
        found = {"features": features, "labels": labels(self.net, features), "image": seen}
        if captions is not None:
            read = self.clip.encode_text(
                clip_tokens(self.tokenizer, captions, length=self.world.max_tokens), normalize=True
            )
            found["cosine"] = (seen * read).sum(-1)
        return found


def load_reference(directory: Path) -> dict[str, torch.Tensor]:
    """Features and CLIP vectors of real renders: float32 [n, size of the network's] each."""
    return {name: tensor.float() for name, tensor in load_file(directory / "reference.safetensors").items()}


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """Images uint8 [n, h, w, 3] as float [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
