"""The denoiser calls used for calibration: sampling the prompts, choosing the steps to keep, and reading them back."""

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.torch import load_file

from vqdm.calibration.recording import Call, evenly_spread
from vqdm.config.options import CalibrationConfig, SamplerConfig
from vqdm.models.loader import sample
from vqdm.prompts import Prompt, PromptList
from vqdm.runs.items import batches
from vqdm.seeds import numpy_generator, torch_generator


def token_limit(pipeline) -> int:
    """Number of tokens the first text encoder sees: its tokenizer's limit, or less where the pipeline cuts earlier."""
    own = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    limit = pipeline.tokenizer.model_max_length
    return limit if own is None else min(limit, own.default)


def sample_batches(
    pipeline, prompts: PromptList, *, config: CalibrationConfig, sampler: SamplerConfig
) -> list[tuple[str, list[Prompt], Callable[[], None]]]:
    """Batches of calibration prompts: name, prompts, and a function that samples the batch from its own noise."""

    def run(batch: list[Prompt]) -> None:
        generators = [torch_generator(config.noise_seed, "calibration", p.id) for p in batch]
        sample(pipeline, [p.text for p in batch], sampler=sampler, generators=generators, output="latent")

    found = []
    for name, rows in batches(len(prompts), config.batch_size):
        batch = list(prompts.prompts[rows.start : rows.stop])
        found.append((name, batch, functools.partial(run, batch)))
    return found


def recorded_positions(config: CalibrationConfig, total: int, batch: str) -> set[int]:
    """The positions, among `total` sampling steps, that are kept for a batch; 0 is the first and noisiest.

    timesteps=normal is PTQ4DM's rule: every batch draws its own, t ~ N(0.4 T, 0.4 T) within [0, T]; T is the noisiest.
    """
    if config.timesteps == "uniform":
        return evenly_spread(total, config.recorded_steps)
    generator = numpy_generator(config.noise_seed, "timesteps", batch)
    positions: set[int] = set()
    while len(positions) < min(total, config.recorded_steps):
        noise_level = generator.normal(0.4, 0.4)
        if 0 < noise_level <= 1:
            positions.add(int((1 - noise_level) * total))
    return positions


def recorded_calls(directory: Path) -> Iterator[Call]:
    """The recorded calls in order, with one in memory at a time."""
    for path in _call_files(directory):
        yield load_file(path)


def call_count(directory: Path) -> int:
    return len(_call_files(directory))


def _call_files(directory: Path) -> list[Path]:
    return sorted((directory / "calls").glob("*.safetensors"))
