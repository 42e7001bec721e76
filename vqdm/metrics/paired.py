"""Against the full-precision image of the same caption and noise."""

import numpy as np
import torch

SMALLEST_ERROR = (1 / 255) ** 2 / 12  # of rounding to 8 bits: identical images count as 58.9 dB, not as infinity


def psnr(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """dB of each image, uint8 [n, h, w, 3] against the same, peak 1, capped at 58.9 dB."""
    difference = (images.astype(np.float64) - originals.astype(np.float64)) / 255
    return -10 * np.log10(np.maximum((difference**2).mean((1, 2, 3)), SMALLEST_ERROR))


def feature_distance(features: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Euclidean distance of each row pair."""
    return (features - originals).norm(dim=-1)
