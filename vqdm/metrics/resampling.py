"""Standard errors of scores over prompts: in closed form where a score is a mean, else by a bootstrap.

Images of one prompt are alike, so a prompt with all its images is what is drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from vqdm.prompts import ImageList
from vqdm.seeds import torch_generator


@dataclass(frozen=True)
class Resamples:
    """`count` draws, with replacement, of as many prompts as there are. The same seed draws the same prompts: two
    methods on the same captions and noise are then compared draw by draw.
    """

    prompts: int
    copies: int = 1  # images of a prompt
    count: int = 100
    seed: int = 0

    @property
    def images(self) -> ImageList:
        return ImageList(range(self.prompts), self.copies)

    def draws(self) -> torch.Tensor:
        """Indices of the prompts in every draw: int64 [count, prompts]."""
        generator = torch_generator(self.seed, "bootstrap")
        return torch.randint(self.prompts, (self.count, self.prompts), generator=generator, device="cpu")

    def rows(self):
        """Images of every draw, one draw after the other: int64 [prompts × copies]."""
        of_prompt = self.images.by_prompt(torch.arange(len(self.images), device="cpu"))
        for drawn in self.draws():
            yield of_prompt[drawn].flatten()

    def weights(self) -> torch.Tensor:
        """Number of times that every image occurs in every draw: float64 [count, prompts × copies]."""
        counts = torch.stack([torch.bincount(drawn, minlength=self.prompts) for drawn in self.draws()])
        return counts.double()[:, [prompt for prompt, _ in self.images]]


def bootstrap(statistic: Callable[[torch.Tensor], float], features: torch.Tensor, resamples: Resamples) -> torch.Tensor:
    """The statistic of the rows of every draw: float64 [count]."""
    return torch.tensor([statistic(features[rows]) for rows in resamples.rows()], dtype=torch.float64, device="cpu")


SetStatistic = Callable[[Resamples], tuple[float, torch.Tensor]]  # of all images; of every draw: float64 [count]


def of_rows(statistic: Callable[[torch.Tensor], float], features: torch.Tensor) -> SetStatistic:
    """A statistic with draws for a score that is computed anew from the rows of every draw, like FID."""
    return lambda resamples: (statistic(features), bootstrap(statistic, features, resamples))


def of_weights(statistic: Callable[[torch.Tensor], torch.Tensor]) -> SetStatistic:
    """A statistic with draws for a score that takes all draws at once as weights, [count, n] -> [count], like KID."""

    def all_and_draws(resamples: Resamples) -> tuple[float, torch.Tensor]:
        weights = resamples.weights()
        found = statistic(torch.cat([torch.ones_like(weights[:1]), weights]))
        return float(found[0]), found[1:]

    return all_and_draws


def with_error(value: float, draws: torch.Tensor) -> dict[str, float]:
    """A score with its standard error and the bias of its draws, since FID rises when rows occur twice."""
    return {"value": float(value), "se": float(draws.std()), "bias": float(draws.mean() - value)}


def _by_prompt(values: np.ndarray, copies: int) -> np.ndarray:
    """float64 [prompts, copies]"""
    return ImageList(range(len(values) // copies), copies).by_prompt(np.asarray(values, np.float64))


def mean_and_error(values: np.ndarray, copies: int = 1) -> dict[str, float]:
    """Mean over images [prompts × copies] and its standard error over prompts, the limit of a bootstrap over them."""
    means = _by_prompt(values, copies).mean(1)
    error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")
    return {"value": float(means.mean()), "se": error}


def ratio_and_error(found: np.ndarray, asked: np.ndarray, copies: int = 1) -> dict[str, float]:
    """Σ found / Σ asked over images, with the standard error of a ratio of sums over prompts (delta method)."""
    found, asked = (_by_prompt(counts, copies).sum(1) for counts in (found, asked))
    if asked.sum() == 0:
        return {"value": float("nan"), "se": float("nan")}
    share = found.sum() / asked.sum()
    residual = found - share * asked
    error = residual.std(ddof=1) / asked.mean() / np.sqrt(len(found)) if len(found) > 1 else float("nan")
    return {"value": float(share), "se": float(error)}
