"""How long the codecs take to encode layers: their linear part timed on a slice, products and factors by the rates.

seconds(out, in) = weight · out · in + column · in + layer + products · 2 · out · in² / matmul + in³ / 3 / cholesky.
Kernels that numba has not compiled yet are not compiled for a plan (4 to 12 seconds): then the linear part is that of a
reference machine, scaled by how fast the two multiply matrices, until layers have been quantized here.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vqdm.codecs import additive_fast, additive_kernels, additive_paper, rtn, viterbi
from vqdm.codecs.additive_steps import residual_kmeans
from vqdm.codecs.encode import encode_layer, needs_hessians
from vqdm.codecs.trellis import SMALL
from vqdm.codecs.trellis_table import load_table
from vqdm.config.options import QuantizeConfig
from vqdm.runs.device import one_thread_each
from vqdm.seeds import torch_generator
from vqdm.stages.plan.probe import Hardware, cached, machine, together
from vqdm.weights.additive import AdditiveScheme, SharedCodebooks
from vqdm.weights.base import Scheme, SharedPart
from vqdm.weights.scalar import ScalarScheme
from vqdm.weights.trellis import TrellisScheme, TrellisTable
from vqdm.weights.trellis_format import side_bits

Shape = tuple[int, int]  # [out, in]
TALL, SHORT = (1280, 128), (320, 128)  # slices that tell what a weight costs from what a column does
SLICE = (512, 128)  # of additive codes
ROUNDS, EPOCHS = 3, 5  # of recipe fast and paper until they gain too little; of nearly Gaussian weights
FITS = additive_fast.FEEDBACK_PASSES - 1 + ROUNDS
KERNEL = 4  # how many times slower than a matrix product the running products of recipe paper are
RECORDED = 2  # products behind a layer's relative output error
OPTIONS = (
    "kind", "bits", "clip", "group_size", "act_order", "recipe", "codebook_bits", "codebooks", "input_scales",
    "beam_size",
)  # fmt: skip


@dataclass(frozen=True)
class CodecSpeed:
    """Seconds per weight, per input and per layer; origin: measured | reference machine."""

    weight: float
    column: float
    layer: float
    origin: str


@dataclass(frozen=True)
class Reference:
    """What `_measured` found on one thread of an AMD EPYC 9004 (Zen 4), which multiplies matrices at `matmul`."""

    matmul: float = 97e9  # FLOP/s
    trellis_weight: float = 6.1e-7
    trellis_column: float = 8.1e-5
    candidate: float = 1.1e-9  # of a search of additive codes, per codeword compared
    fit: float = 9e-8  # of codebooks, per weight, codebook and fit
    distance: float = 3.6e-9  # of k-means, per point, codeword and iteration


REFERENCE = Reference()


def encode_seconds(
    shapes: list[Shape], hardware: Hardware, speed: CodecSpeed, *, config: QuantizeConfig, workers: int
) -> float:
    """All layers by so many workers, the largest first."""
    each = [layer_seconds(shape, hardware, speed, config=config) for shape in shapes]
    return max(sum(each) / workers, max(each, default=0.0))


def layer_seconds(shape: Shape, hardware: Hardware, speed: CodecSpeed, *, config: QuantizeConfig) -> float:
    out, size = shape
    linear = speed.weight * out * size + speed.column * size
    if config.kind == "trellis" and out * size <= SMALL:
        linear *= 2  # uniform rates are tried, too
    products = _products(shape, config) + (RECORDED if needs_hessians(config) else 0)
    return linear + speed.layer + _matrix_seconds(shape, products, hardware, config)


def _matrix_seconds(shape: Shape, products: float, hardware: Hardware, config: QuantizeConfig) -> float:
    out, size = shape
    factors = config.kind in ("trellis", "gptq") or (config.kind == "additive" and config.recipe == "fast")
    cholesky = size**3 / 3 / hardware.worker_cholesky if factors else 0.0
    return 2 * products * out * size**2 / hardware.worker_matmul + cholesky


def _products(shape: Shape, config: QuantizeConfig) -> float:
    """How often a codec multiplies [out, in] by [in, in], or as much work; half for what feeds errors forward."""
    out, size = shape
    if config.kind == "trellis":
        return 5.0 if out * size <= SMALL else 1.5
    if config.kind == "gptq":
        return 0.5
    if config.kind == "rtn":
        trials = 1 + len(rtn.JOINT_FACTORS) + 2 * len(rtn.END_FACTORS)
        return 0.5 + trials * (config.group_size or size) / size if config.clip == "hessian" else 0.0
    if config.recipe == "paper":
        return EPOCHS * (additive_paper.STEPS + KERNEL * config.beam_size)
    searches = additive_fast.FEEDBACK_PASSES + ROUNDS + 1  # each with the losses after it
    gradients = 1 + additive_fast.GRADIENT_STEPS if config.codebooks == "layer" else 0
    return 2 * searches + 2 + FITS * (1 + gradients) + 2


def probe_codec(config: QuantizeConfig, hardware: Hardware, *, workers: int, cache: Path) -> CodecSpeed | None:
    """From the cache, measured now, or, kernels not being compiled, of the reference machine; None for adaround."""
    if config.kind not in ("rtn", "gptq", "trellis", "additive"):
        return None
    key = {name: value for name, value in dataclasses.asdict(config).items() if name in OPTIONS}
    key |= {"workers": workers} | machine()
    if not is_compiled(config):
        return reference_speed(config, hardware)
    return CodecSpeed(**cached(cache, "codec", key, partial(_measured, config, hardware, workers)))


def is_compiled(config: QuantizeConfig) -> bool:
    """Whether numba has kernels of this codec on disk that are newer than their source."""
    if config.kind not in ("trellis", "additive"):
        return True
    if config.kind == "trellis":
        source, kernel = Path(viterbi.__file__), "_search_column"
    else:
        source, kernel = Path(additive_kernels.__file__), "search_rows" if config.recipe == "paper" else "search_groups"
    folder = Path(additive_kernels.search_groups.stats.cache_path)  # one for all files of a package
    compiled = folder.glob(f"{source.stem}.{kernel}-*.nbc")
    return any(file.stat().st_mtime >= source.stat().st_mtime for file in compiled)


def reference_speed(config: QuantizeConfig, hardware: Hardware) -> CodecSpeed:
    """As on the reference machine, by this one's matrix products."""
    slower = REFERENCE.matmul / hardware.worker_matmul
    if config.kind == "trellis":
        weight, column, layer = REFERENCE.trellis_weight, REFERENCE.trellis_column, 0.0
    else:
        weight, column, layer = REFERENCE.candidate * _candidates(config), 0.0, REFERENCE.distance * _kmeans(config)
        if config.recipe == "fast" and config.codebooks == "layer":
            weight += REFERENCE.fit * FITS * _codebooks(config)
    return CodecSpeed(slower * weight, slower * column, slower * layer, "reference machine")


def _codebooks(config: QuantizeConfig) -> int:
    return int(config.bits) * config.group_size // config.codebook_bits


def _candidates(config: QuantizeConfig) -> float:
    """Codewords that searches compare, per weight."""
    count, size = _codebooks(config), 1 << config.codebook_bits
    if config.recipe == "paper":
        return (EPOCHS * config.beam_size + additive_paper.KMEANS_ITERATIONS) * count * size / config.group_size

    def of_beam(beam: int) -> float:
        return size * (1 + (count - 1) * beam) / config.group_size

    half = additive_fast.FEEDBACK_PASSES - 1
    return half * of_beam(max(1, config.beam_size // 2)) + (ROUNDS + 2) * of_beam(config.beam_size)


def _kmeans(config: QuantizeConfig) -> float:
    """Distances that k-means on the sample of a layer takes, in all iterations."""
    if config.recipe == "paper" or config.codebooks != "layer":
        return 0.0
    return additive_fast.SAMPLES * additive_fast.KMEANS_ITERATIONS * _codebooks(config) << config.codebook_bits


def _measured(config: QuantizeConfig, hardware: Hardware, workers: int) -> dict:
    """The linear part on slices: all that they take but products and factors."""
    with one_thread_each():
        if config.kind == "additive":
            return _measured_additive(config, hardware, workers)
        (tall, size), (short, _) = TALL, SHORT
        passes = 2 if config.kind == "trellis" else 1
        ones = [_slice_seconds(shape, hardware, config, workers) / size / passes for shape in (TALL, SHORT)]
    weight = max(0.0, (ones[0] - ones[1]) / (tall - short))
    return {"weight": weight, "column": max(0.0, ones[1] - weight * short), "layer": 0.0, "origin": "measured"}


def _measured_additive(config: QuantizeConfig, hardware: Hardware, workers: int) -> dict:
    layer = 0.0
    if _kmeans(config):
        layer = max(together(workers, lambda: _seconds(partial(_learn, config))))
    groups = SLICE[0] * SLICE[1] / config.group_size
    whole = _slice_seconds(SLICE, hardware, config, workers) - layer * min(1.0, groups / additive_fast.SAMPLES)
    return {"weight": max(0.0, whole) / (SLICE[0] * SLICE[1]), "column": 0.0, "layer": layer, "origin": "measured"}


def _learn(config: QuantizeConfig) -> Tensor:
    points = torch.randn(additive_fast.SAMPLES, config.group_size, generator=torch_generator(0, "probe"))
    return residual_kmeans(
        points, _codebooks(config), 1 << config.codebook_bits, iterations=additive_fast.KMEANS_ITERATIONS,
        generator=torch_generator(0, "probe"),
    )  # fmt: skip


def _slice_seconds(shape: Shape, hardware: Hardware, config: QuantizeConfig, workers: int) -> float:
    """One layer of a slice's shape without its products and factors, while all workers encode one."""
    draw = torch_generator(0, "probe", f"{shape[0]}x{shape[1]}")
    weight, hessian = torch.randn(shape, generator=draw), torch.eye(shape[1])
    scheme, shared = _scheme(shape, config)
    encode = partial(encode_layer, weight, hessian, scheme, config=config, shared=shared, layer="slice")
    if config.kind != "additive":  # whose slice takes so long that loading the kernels does not count
        encode()
    seconds = max(together(workers, partial(_seconds, encode)))
    return max(0.0, seconds - _matrix_seconds(shape, _products(shape, config), hardware, config))


def _seconds(call: Callable[[], object]) -> float:
    """Of this thread on the CPU, so that other programs count for less."""
    began = time.thread_time()
    call()
    return time.thread_time() - began


def _scheme(shape: Shape, config: QuantizeConfig) -> tuple[Scheme, SharedPart | None]:
    """As a layer of a model would have it, and what it shares."""
    if config.kind == "trellis":
        return TrellisScheme(bits=config.bits + side_bits(shape)), TrellisTable.from_values(load_table())
    if config.kind != "additive":
        return ScalarScheme(codec=config.kind, bits=int(config.bits), group_size=config.group_size), None
    scheme = AdditiveScheme(
        num_codebooks=_codebooks(config),
        codebook_bits=config.codebook_bits,
        group_size=config.group_size,
        input_scales=config.input_scales,
        shared=None if config.codebooks == "layer" else "codebooks",
    )
    shared = None if scheme.shared is None else SharedCodebooks.from_codebooks(scheme, _learn(config)[:, :, None])
    return scheme, shared
