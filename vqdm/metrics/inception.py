"""Inception-v3 features by torch-fidelity's network, in two protocols: as VQDM resizes images, and without resizing."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vqdm.metrics.sources import load_tensors
from vqdm.runs.device import full_float32

PAPER_SIZE = 256


class Inception:
    """torch-fidelity's Inception-v3. resize: "paper" (short side to 256 by LANCZOS, centre crop 256) or "none"."""

    def __init__(self, weights: Path, *, resize: str, device: str):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.resize, self.device = resize, device
        # the library unpickles files without restriction, so it is given tensors that were read safely
        checked = io.BytesIO()
        torch.save(load_tensors(weights), checked)
        checked.seek(0)
        names = ["2048", "logits_unbiased"]
        self.net = FeatureExtractorInceptionV3("inception", names, feature_extractor_weights_path=checked).to(device)

    @torch.no_grad()
    @full_float32()
    def columns(self, images: list[np.ndarray], captions: list[str] | None = None) -> dict[str, torch.Tensor]:
        """Columns of images, uint8 [h, w, 3] each: {"features": float32 [n, 2048], "logits": float32 [n, 1008]}.

        Images of the same size go through the network together; photographs in a folder have many sizes.
        """
        pixels = [crop_256(image) for image in images] if self.resize == "paper" else images
        if len({image.shape for image in pixels}) > 1:
            parts = [self.net(self._batch([image])) for image in pixels]
            features, logits = (torch.cat(column) for column in zip(*parts, strict=True))
        else:
            features, logits = self.net(self._batch(pixels))
        return {"features": features.cpu(), "logits": logits.cpu()}

    def _batch(self, images: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.device)


def crop_256(image: np.ndarray) -> np.ndarray:
    """Resize the short side to 256 pixels by LANCZOS, crop the middle 256 × 256, both by torchvision on PIL images."""
    from torchvision.transforms.functional import InterpolationMode, center_crop, resize

    picture = resize(Image.fromarray(image), PAPER_SIZE, InterpolationMode.LANCZOS)
    return np.asarray(center_crop(picture, PAPER_SIZE))
