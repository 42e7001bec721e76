"""Scores against the full-precision image of the same caption and noise: PSNR, SSIM, and LPIPS."""

from pathlib import Path

import numpy as np
import torch

from vqdm.runs.device import full_float32

SMALLEST_ERROR = (1 / 255) ** 2 / 12  # of rounding to 8 bits: identical images count as 58.9 dB, not as infinity
C1, C2 = 0.01**2, 0.03**2  # of SSIM, for a peak of 1
RADIUS, SIGMA = 5, 1.5  # of its window, in pixels
AT_ONCE = 2**21  # pixels that are looked at together: 600 MB at their worst moment


def psnr(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """PSNR of each image in dB, uint8 [n, 3, h, w] against the same, peak 1: float64 [n], at most 58.9."""
    difference = images.int() - originals.int()
    squares = difference.square_().sum((1, 2, 3)).cpu().double() / (difference[0].numel() * 255**2)
    return -10 * squares.clamp_(min=SMALLEST_ERROR).log10()


@full_float32()
def ssim(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image, uint8 [n, 3, h, w] against the same: float64 [n].

    Wang et al. 2004, eq. 13, with a Gaussian window of 11 pixels, σ 1.5, over all pixels: images are mirrored at their
    edges. In float32, which holds 1e-5 because nothing small is left over from the subtraction of two large numbers:
    with d = x − y, eq. 13 is [1 − mean(d)² / (mean(x)² + mean(y)² + C1)] · [1 − var(d) / (var(x) + var(y) + C2)].
    """
    x = images.float().div_(255)
    d = x - originals.float().div_(255)
    level = x.mean((2, 3), keepdim=True)  # variances do not depend on it, and rounding is small near 0
    x, y = x - level, x - level - d
    mean_x, mean_d = _blurred(x), _blurred(d)
    mean_y = mean_x - mean_d
    variances = _blurred(x.square().add_(y.square_())) - mean_x.square() - mean_y.square()
    structure = 1 - (_blurred(d.square_()) - mean_d.square()) / (variances.clamp_(min=0) + C2)
    light = 1 - mean_d.square() / ((mean_x + level).square() + (mean_y + level).square() + C1)
    return light.mul_(structure).mean((1, 2, 3), dtype=torch.float64).cpu()


def _blurred(maps: torch.Tensor) -> torch.Tensor:
    """Maps [n, c, h, w], each weighed by the window around every pixel."""
    channels = maps.shape[1]
    window = torch.exp(-torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64, device="cpu").square() / (2 * SIGMA**2))
    window = (window / window.sum()).to(maps)
    kernel = torch.outer(window, window).expand(channels, 1, -1, -1)
    edge = [RADIUS] * 4
    return torch.nn.functional.conv2d(torch.nn.functional.pad(maps, edge, mode="reflect"), kernel, groups=channels)


def feature_distance(features: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Euclidean distance between corresponding rows."""
    return (features - originals).norm(dim=-1)


class Pairs:
    """PSNR and SSIM, on the device; needs no weights."""

    def __init__(self, *, device: str):
        self.device = device

    @torch.no_grad()
    def columns(self, images: np.ndarray, originals: np.ndarray) -> dict[str, torch.Tensor]:
        """uint8 [n, h, w, 3] each -> {score: float64 [n]}."""
        size = max(1, AT_ONCE // (images.shape[1] * images.shape[2]))
        parts = [self._columns(images[i : i + size], originals[i : i + size]) for i in range(0, len(images), size)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _columns(self, *pair: np.ndarray) -> dict[str, torch.Tensor]:
        own, original = (torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2) for pixels in pair)
        return {"psnr": psnr(own, original), "ssim": ssim(own, original)}


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
