"""The layers that codecs are measured on: synthetic ones in SDXL's shapes, those of a Python file, the tiny model's.

Synthetic weights are heavy-tailed Gaussian mixtures with log-normal row and column scales and a low-rank part.
Inputs of linear layers have power-law spectra, non-zero means and a few outlier channels; those of the text layer come
from three kinds of tokens; convolutions read SiLU of smooth random fields. Convolutions are in the column order of
`specs.weight_to_matrix`. Hessians are second moments of a sample; the held-out one is of another sample of the same.
"""

import math
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from vqdm.calibration.calls import recorded_positions, sample_batches
from vqdm.calibration.hessian import HessianRecorder, add_second_moment, token_count
from vqdm.calibration.recording import Recorder, play_back
from vqdm.config.options import CalibrationConfig, ModelConfig, RescaleConfig
from vqdm.errors import UserError
from vqdm.models.loader import denoiser_of, denoiser_on_meta, load_pipeline
from vqdm.models.specs import ConvGeometry, LayerSpec, layer_specs, weight_to_matrix
from vqdm.prompts import load_prompts
from vqdm.seeds import numpy_generator, torch_generator

TOKENS = 16  # per input, behind the Hessian of a synthetic linear layer
SPECTRUM = 1.2  # exponent of the power law that eigenvalues of input moments fall by
CONV = ConvGeometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
FREQUENT = 4  # layers of the tiny model that must share a shape for one of them to be measured by default
MODELS = {  # as in conf/model/
    "tiny": ModelConfig(builtin="tiny"),
    "tiny_outlier": ModelConfig(name="tiny_outlier", builtin="tiny", rescale=RescaleConfig(sigma=0.8)),
}


@dataclass(frozen=True)
class Layer:
    """fp32: weight [out, in]; second moments [in, in] of its inputs, to encode with and of other data."""

    name: str
    weight: Tensor
    hessian: Tensor
    heldout_hessian: Tensor

    @cached_property
    def powers(self) -> tuple[float, float, float]:
        """tr(W H Wᵀ) with the Hessian and the held-out one, and ‖W‖²."""
        weight = self.weight.double()
        return (
            quadratic(weight, self.hessian),
            quadratic(weight, self.heldout_hessian),
            float(weight.square().sum()),
        )

    @cached_property
    def variances(self) -> tuple[Tensor, Tensor]:
        """Variances of rows [out] and of the output error's independent directions in a row [in], which multiply.

        fp64: mean squares of the rows, and the eigenvalues of H in columns scaled to the weight's own RMS.
        """
        weight = self.weight.double()
        rows = weight.square().mean(1)
        columns = (weight.square() / rows.clamp(min=1e-300)[:, None]).mean(0).sqrt()
        scaled = self.hessian.double() * columns * columns[:, None]
        return rows, torch.linalg.eigvalsh(scaled).clamp(min=0)


def quadratic(matrix: Tensor, hessian: Tensor) -> float:
    """tr(A H Aᵀ) in float64."""
    matrix = matrix.double()
    return float(((matrix @ hessian.double()) * matrix).sum())


def synthetic(name: str, seed: int) -> Layer:
    """One of SYNTHETIC; the same for the same name and seed."""
    weight, hessian, heldout = SYNTHETIC[name](torch_generator(seed, "benchmark layer", name), seed)
    return Layer(name, weight, hessian, heldout)


Made = tuple[Tensor, Tensor, Tensor]  # weight, Hessian, held-out Hessian


def gaussian_layer(out: int, size: int, draw: Generator, seed: int) -> Made:
    return torch.randn(out, size, generator=draw) / math.sqrt(size), torch.eye(size), torch.eye(size)


def linear_layer(out: int, size: int, draw: Generator, seed: int) -> Made:
    weight = heavy_tailed_weight(out, size, draw)
    factor, mean = input_statistics(size, draw)
    sample = partial(gaussian_moment, factor, mean, TOKENS * size)
    return weight, *(sample(numpy_generator(seed, f"{part} moment", size)) for part in ("first", "held-out"))


def text_layer(out: int, size: int, draw: Generator, seed: int) -> Made:
    """A layer that reads text.

    Of 77 tokens one is the constant start, 16 are words, the rest nearly constant padding.
    """
    weight = heavy_tailed_weight(out, size, draw)
    factor, mean = input_statistics(size, draw)
    padding_mean = mean + 0.5 * mean.square().mean().sqrt() * torch.randn(size, generator=draw)
    start = 4 * factor.square().sum(1).sqrt() * torch.randn(size, generator=draw)
    tokens = TOKENS * size

    def moment(part: str) -> Tensor:
        words = gaussian_moment(factor, mean, tokens, numpy_generator(seed, f"{part} words", size))
        padding = gaussian_moment(0.3 * factor, padding_mean, tokens, numpy_generator(seed, f"{part} padding", size))
        return (torch.outer(start, start) + 16 * words + 60 * padding) / 77

    return weight, moment("first"), moment("held-out")


def conv_layer(out: int, channels: int, draw: Generator, seed: int) -> Made:
    """3×3; neighbouring taps are correlated, the middle one is stronger."""
    taps = 0.25 ** (torch.arange(3)[:, None] - torch.arange(3)).abs().float()
    across = torch.linalg.cholesky(torch.kron(taps, taps))  # [9, 9]
    weight = heavy_tailed_weight(out, channels * 9, draw, flat=True).view(out, channels, 9) @ across.T
    weight[:, :, 4] *= 1.25
    columns, rows = lognormal(channels, 0.3, draw), lognormal(out, 0.3, draw)
    weight = (weight * columns[:, None] * rows[:, None, None]).transpose(1, 2).flatten(1).contiguous()
    statistics = input_statistics(channels, draw)
    return weight, *(
        conv_moment(channels, *statistics, torch_generator(seed, f"{p} images")) for p in ("first", "held")
    )


def lognormal(count: int, sigma: float, draw: Generator) -> Tensor:
    return torch.exp(sigma * torch.randn(count, generator=draw))


def heavy_tailed_weight(out: int, size: int, draw: Generator, *, flat: bool = False) -> Tensor:
    """[out, in] of RMS near 1/√in; every weight has its own log-normal deviation (kurtosis 3.9).

    flat: without the scales of rows and columns.
    """
    spread = torch.exp(0.25 * torch.randn(out, size, generator=draw) - 0.25**2)
    weight = spread * torch.randn(out, size, generator=draw)
    rank = 8
    low = torch.randn(out, rank, generator=draw) @ torch.randn(rank, size, generator=draw) / math.sqrt(rank)
    weight = (math.sqrt(0.85) * weight + math.sqrt(0.15) * low) / math.sqrt(size)
    return weight if flat else weight * lognormal(out, 0.3, draw)[:, None] * lognormal(size, 0.3, draw)


def input_statistics(size: int, draw: Generator) -> tuple[Tensor, Tensor]:
    """A factor [in, in] of the covariance of inputs, and their mean [in]; one channel in a hundred is six-fold."""
    eigenvalues = (1 + 100 * torch.arange(size) / size) ** -SPECTRUM
    basis = torch.linalg.qr(torch.randn(size, size, generator=draw)).Q
    gains = lognormal(size, 0.4, draw)
    gains[torch.randperm(size, generator=draw)[: max(1, size // 100)]] *= 6
    factor = gains[:, None] * basis * (eigenvalues / eigenvalues.mean()).sqrt()
    return factor, 0.4 * gains * torch.randn(size, generator=draw)


def gaussian_moment(factor: Tensor, mean: Tensor, tokens: int, generator) -> Tensor:
    """The second moment of `tokens` > in drawn Gaussian vectors, without drawing them: Bartlett's decomposition.

    The scatter around the sample's mean is L A Aᵀ Lᵀ, A lower triangular with χ on its diagonal and Gaussian below.
    """
    size = len(mean)
    triangle = torch.from_numpy(generator.standard_normal((size, size), dtype="float32")).tril(-1)
    freedom = tokens - 1 - torch.arange(size, dtype=torch.float64).numpy()
    triangle.diagonal().copy_(torch.from_numpy(generator.chisquare(freedom)).sqrt())
    scattered = factor @ triangle
    shift = torch.from_numpy(generator.standard_normal(size, dtype="float32")) / math.sqrt(tokens)
    centre = mean + factor @ shift
    return torch.addmm(torch.outer(centre, centre), scattered, scattered.T, alpha=1 / tokens)


def conv_moment(
    channels: int, factor: Tensor, mean: Tensor, draw: Generator, *, images: int = 32, size: int = 32
) -> Tensor:
    """Second moment of 3×3 patches of SiLU of correlated channels, each a sum of noises at four resolutions."""
    total, tokens = torch.zeros(9 * channels, 9 * channels), 0
    roughness = torch.linspace(0.2, 0.9, channels)[:, None, None]
    for _ in range(images):
        field = torch.zeros(1, channels, size, size)
        for level in range(4):
            noise = torch.randn(1, channels, size >> level, size >> level, generator=draw)
            field += 2 ** (roughness * level) * F.interpolate(noise, size=(size, size), mode="bilinear")
        field /= field.std((0, 2, 3), keepdim=True)
        inputs = F.silu(torch.einsum("oc,nchw->nohw", factor, field) + mean[:, None, None])
        add_second_moment(total, inputs, CONV)
        tokens += token_count(inputs, CONV)
    return total / tokens


SYNTHETIC: dict[str, Callable[[Generator, int], Made]] = {
    "linear640": partial(linear_layer, 640, 640),
    "linear1280": partial(linear_layer, 1280, 1280),
    "text2048": partial(text_layer, 1280, 2048),
    "conv320": partial(conv_layer, 320, 320),
    "gaussian640": partial(gaussian_layer, 640, 640),
}


def make_layer_of(file: Path, names: list[str]) -> Callable[[str, int], dict]:
    """The `make_layer` of a Python file, which is executed. UserError if it has none, or lists others in SHAPES."""
    if not file.is_file():
        raise UserError(f"--layers-from {file}: no such file")
    content = runpy.run_path(str(file), run_name="layers")
    if not callable(content.get("make_layer")):
        raise UserError(f"--layers-from {file} defines no make_layer(name, seed)")
    if not names:
        raise UserError(f"--layers-from {file} needs --layers, the names to make")
    known = content.get("SHAPES", names)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--layers: {file.name} makes no {unknown[0]!r}; it makes {', '.join(known)}")
    return content["make_layer"]


def from_dict(name: str, made: dict) -> Layer:
    """A layer that another file made; "conv" stands for 3×3 with columns (in, kh, kw), here (kh, kw, in)."""
    parts = [made[key].detach().float() for key in ("weight", "hessian", "heldout_hessian")]
    if made["kind"] == "conv":
        columns = torch.arange(parts[0].shape[1]).view(-1, 9).T.flatten()
        parts = [parts[0][:, columns], *(part[columns][:, columns] for part in parts[1:])]
    return Layer(name, *(part.contiguous() for part in parts))


def model_specs(config: ModelConfig, *, all_layers: bool) -> list[LayerSpec]:
    """The quantized layers of a model; unless all are wanted, the first of every shape that several have."""
    specs = layer_specs(denoiser_on_meta(config), pattern=config.layers, min_size=config.min_size)
    if all_layers:
        return specs
    alike: dict[tuple, list[LayerSpec]] = {}
    for spec in specs:
        alike.setdefault((spec.kind, spec.shape), []).append(spec)
    return [members[0] for members in alike.values() if len(members) >= FREQUENT]


def model_layers(config: ModelConfig, specs: list[LayerSpec]) -> Iterator[Layer]:
    """Hessians from the pipeline's default calibration on training captions; held out: on test captions."""
    pipeline = load_pipeline(config, device="cpu")
    denoiser = denoiser_of(pipeline)
    hessians, heldout = (recorded_hessians(pipeline, specs, config, split=split) for split in ("train", "test"))
    for spec in specs:
        weight = weight_to_matrix(denoiser.get_submodule(spec.name).weight.detach().float()).contiguous()
        yield Layer(spec.name, weight, hessians[spec.name], heldout[spec.name])


def recorded_hessians(pipeline, specs: list[LayerSpec], config: ModelConfig, *, split: str) -> dict[str, Tensor]:
    calibration = CalibrationConfig(source="tiny", split=split)
    prompts = load_prompts(source="tiny", split=split, n=calibration.n)
    denoiser = denoiser_of(pipeline)
    with HessianRecorder(denoiser, specs) as hessians:
        hessians.enabled = False
        for name, _, run in sample_batches(pipeline, prompts, config=calibration, sampler=config.sampler):
            positions = recorded_positions(calibration, config.sampler.steps, name)
            with Recorder(denoiser, steps=positions) as recorder:
                run()
            hessians.enabled = True
            for call in recorder.calls:
                play_back(denoiser, call, device="cpu")
            hessians.enabled = False
    return hessians.hessians()


def find_layers(
    names: list[str], *, file: Path | None, model: str | None, all_layers: bool, seed: int
) -> tuple[int, Iterator[Layer]]:
    """How many layers are asked for, and the layers, each made when its turn comes. UserError for unknown names.

    names: none for all. file: a Python file that makes them. model: one of MODELS, whose layers come after the
    synthetic ones.
    """
    if file is not None:
        make = make_layer_of(file, names)
        return len(names), (from_dict(name, make(name, seed)) for name in names)
    if model is not None and model not in MODELS:
        raise UserError(f"--model {model}: it is one of {', '.join(MODELS)}")
    specs = [] if model is None else model_specs(MODELS[model], all_layers=all_layers or bool(names))
    known = [*SYNTHETIC, *(spec.name for spec in specs)]
    unknown = [name for name in names if name not in known]
    if unknown:
        shown = ", ".join(SYNTHETIC) + (", or a layer of the model" if specs else "")
        raise UserError(f"--layers: there is no {unknown[0]!r}; there are {shown}")
    drawn = [name for name in SYNTHETIC if name in (names or known)]
    specs = [spec for spec in specs if spec.name in (names or known)]

    def layers() -> Iterator[Layer]:
        for name in drawn:
            yield synthetic(name, seed)
        if specs:
            yield from model_layers(MODELS[model], specs)

    return len(drawn) + len(specs), layers()
