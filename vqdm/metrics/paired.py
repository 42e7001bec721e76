"""Scores against the full-precision image of the same caption and noise: PSNR, SSIM, and LPIPS."""

from pathlib import Path

import numpy as np
import torch

from vqdm.runs.device import full_float32

SMALLEST_ERROR = (1 / 255) ** 2 / 12  # of rounding to 8 bits: identical images count as 58.9 dB, not as infinity


def psnr(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """PSNR of each image in dB, uint8 [n, h, w, 3] against the originals, peak 1, capped at 58.9 dB."""
    difference = (images.astype(np.float64) - originals.astype(np.float64)) / 255
    return -10 * np.log10(np.maximum((difference**2).mean((1, 2, 3)), SMALLEST_ERROR))


def ssim(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Structural similarity of each image (Wang et al. 2004: Gaussian window of 11 pixels, σ 1.5), by torchmetrics."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    pair = (torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255 for pixels in (images, originals))
    return structural_similarity_index_measure(*pair, data_range=1.0, reduction="none").reshape(-1).numpy()


def feature_distance(features: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Euclidean distance between corresponding rows."""
    return (features - originals).norm(dim=-1)


class Pairs:
    """PSNR and SSIM; needs no weights."""

    def columns(self, images: np.ndarray, originals: np.ndarray) -> dict[str, torch.Tensor]:
        """uint8 [n, h, w, 3] each -> {score: float64 [n]}."""
        return {
            "psnr": torch.from_numpy(psnr(images, originals)),
            "ssim": torch.from_numpy(ssim(images, originals)),
        }


class Lpips:
    """LPIPS 0.1 with AlexNet (Zhang et al. 2018), by the authors' package, which ships all weights but AlexNet's."""

    def __init__(self, alexnet: Path, *, device: str):
        import lpips

        from vqdm.metrics.sources import load_tensors

        self.device = device
        self.net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        self.net.net.load_state_dict(_in_slices(load_tensors(alexnet), self.net.net))
        self.net.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    @full_float32()
    def columns(self, images: np.ndarray, originals: np.ndarray) -> dict[str, torch.Tensor]:
        """uint8 [n, h, w, 3] each -> {"lpips": float32 [n]}."""
        pair = (
            torch.from_numpy(p).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1 for p in (images, originals)
        )
        return {"lpips": self.net(*pair).flatten().cpu()}


def _in_slices(tensors: dict[str, torch.Tensor], slices: torch.nn.Module) -> dict[str, torch.Tensor]:
    """torchvision's `features.3.weight` under the name of the slice that lpips cuts layer 3 into."""
    wanted = {name.partition(".")[2]: name for name in slices.state_dict()}
    return {name: tensors[f"features.{layer}"] for layer, name in wanted.items()}
