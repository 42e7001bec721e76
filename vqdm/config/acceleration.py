"""Options of what makes a denoiser's calls fewer or cheaper, beside its weights' codes; kind=none changes nothing."""

import dataclasses

from vqdm.config.ranges import MOST, choice, number

SCALES = {"dynamic": ("token", "block"), "static": ("tensor", "groups")}  # of activations, by kind
LEAST_CALLS = 8  # of a cache: with fewer, neighbouring features are as far apart as first and last


@dataclasses.dataclass
class CacheConfig:
    """Features of earlier calls in the place of a U-Net's deeper part (DeepCache, TaylorSeer, CacheQuant)."""

    kind: str = choice("none", "branch")
    interval: int = number(2, least=1, most=1000)  # calls per full one
    depth: int = number(1, least=1, most=100)  # residual units of the last up block that run in every call
    schedule: str = choice("uniform", "quadratic", "dynamic")  # of the full calls; dynamic: by features (CacheQuant)
    predict: str = choice("linear", "reuse")  # a line through the last two full calls' features, or the last one's
    correction: str = choice("none", "affine")  # affine: per channel and call, by least squares (CacheQuant's DEC)
    prompts: int = number(16, least=1, most=MOST)  # of the calibration's, that dynamic and affine look at


@dataclasses.dataclass
class PruneConfig:
    """Operators of a U-Net that are taken out before its weights are quantized (LD-Pruner)."""

    kind: str = choice("none", "operators")
    # latents: change of the final latents' mean and deviation (LD-Pruner); prediction: error of the guided prediction
    score: str = choice("latents", "prediction")
    share: float = number(0.1, least=0, most=0.95, above=True)  # of the denoiser's weights, at least
    prompts: int = number(32, least=2, most=MOST)  # of the calibration's, for score=latents
    keep: str | None = None  # regular expression for operators that stay


@dataclasses.dataclass
class ActivationsConfig:
    """Inputs of layers in few bits (DGQ, and what libraries do dynamically)."""

    kind: str = choice("none", "dynamic", "static")  # scales as they come, or known from calibration
    bits: int = number(8, least=2, most=8)  # of every input of a layer, without its scales
    per: str = choice("token", "block", "tensor", "groups")  # dynamic: token, block; static: tensor, groups (DGQ)
    block: int = number(16, least=1, most=65_536)  # channels
    groups: int = number(8, least=1, most=256)  # of channels, by k-means of their ranges
    column_scales: bool = False  # quantize after the codes' own scales of their inputs (trellis)
    # int8, fp8: real, for Linear layers of scalar codes; the others simulated
    product: str = choice("simulated", "int8", "fp8")
    # of attention's scores, in steps of each image's largest one; None: they stay, and attention stays fused
    scores_bits: int | None = number(None, least=2, most=8)
    scores: str = choice("uniform", "log")  # even steps, or halves of the largest (DGQ)
    bos: bool = True  # the text's first token is left alone, in cross-attention (DGQ)
    prompts: int = number(32, least=1, most=MOST)  # of the calibration's, for static
    keep: str | None = None  # regular expression for layers that read 16 bits
