"""FID and KID between two sets of features, through torchmetrics; they know nothing of models or images."""

import torch
from torch import nn

from vqdm.seeds import torch_generator


class _AsTheyAre(nn.Module):
    """torchmetrics wants a feature extractor; these inputs are features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def fid(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Fréchet distance of Gaussians fitted to [n, d] and [m, d], float64 (Heusel et al. 2017, eq. 6)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    alone = {"sync_on_compute": False}  # one process scores; it must not wait for others
    metric = FrechetInceptionDistance(feature=_AsTheyAre(real.shape[1]), **alone).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def kid(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Unbiased squared MMD with kernel (x·y/d + 1)³ (Binkowski et al. 2018): once, not averaged over random subsets.

    Of the larger set, only as many rows as the smaller one has are used, the first ones.
    """
    from torchmetrics.image.kid import poly_mmd

    real, fake = real.double(), fake.double()
    size = min(len(real), len(fake))  # torchmetrics' estimator takes equal sizes
    return float(poly_mmd(real[:size], fake[:size]))


def bootstrap_error(statistic, fake: torch.Tensor, *, resamples: int, seed: int) -> float:
    """Standard deviation of `statistic(rows of fake)` over resampled rows. FID's own bias in n is not in it."""
    generator = torch_generator(seed, "bootstrap")
    values = []
    for _ in range(resamples):
        rows = torch.randint(len(fake), (len(fake),), generator=generator)
        values.append(statistic(fake[rows]))
    return float(torch.tensor(values).std())
