"""Calibration: prompts with ids, and calls of the full-precision denoiser recorded while it samples them.

Every quantizer of the model reads the same directory: `prompts.jsonl` and `calls/<batch>-<step>.safetensors`.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from tqdm import tqdm

from vqdm.config import CalibrationConfig, SamplerConfig
from vqdm.models.loader import denoiser_of, sample
from vqdm.models.recording import Call, Recorder, evenly_spread
from vqdm.prompts import Prompt, PromptList, one_line, token_report
from vqdm.seeds import numpy_generator, torch_generator
from vqdm.stages.layout import batches
from vqdm.store import atomic_write, read_item, write_item

log = logging.getLogger("vqdm")


def calibrate(
    directory: Path, pipeline, prompts: PromptList, *, config: CalibrationConfig, sampler: SamplerConfig
) -> dict:
    """Fill the stage's directory; batches that are there are kept. Returns what the manifest should say."""
    atomic_write(directory / "prompts.jsonl", prompts.to_jsonl())
    tokens = token_report(prompts, pipeline.tokenizer, token_limit(pipeline))
    log.info("calibration: %s; %s", prompts.origin, one_line(tokens))
    for name, batch, run in tqdm(
        sample_batches(pipeline, prompts, config=config, sampler=sampler), desc="calibrate", unit="batch"
    ):
        if read_item(directory, name) is None:
            with Recorder(denoiser_of(pipeline), steps=recorded_positions(config, sampler.steps, name)) as recorder:
                run()
            files = {f"calls/{name}-{i:02d}.safetensors": to_bytes(call) for i, call in enumerate(recorder.calls)}
            write_item(directory, name, files, {"prompts": [p.id for p in batch], "calls": len(recorder.calls)})
    return {"origin": prompts.origin, "prompts_sha256": prompts.sha256, "tokens": tokens}


def token_limit(pipeline) -> int:
    """Tokens that the first text encoder sees: its tokenizer's, or fewer where the pipeline cuts by itself."""
    own = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    limit = pipeline.tokenizer.model_max_length
    return limit if own is None else min(limit, own.default)


def sample_batches(
    pipeline, prompts: PromptList, *, config: CalibrationConfig, sampler: SamplerConfig
) -> list[tuple[str, list[Prompt], Callable[[], None]]]:
    """Every batch of calibration prompts: its name, its prompts, and what samples it from its own noise."""

    def run(batch: list[Prompt]) -> None:
        generators = [torch_generator(config.noise_seed, "calibration", p.id) for p in batch]
        sample(pipeline, [p.text for p in batch], sampler=sampler, generators=generators, output="latent")

    found = []
    for name, rows in batches(len(prompts), config.batch_size):
        batch = list(prompts.prompts[rows.start : rows.stop])
        found.append((name, batch, functools.partial(run, batch)))
    return found


def recorded_positions(config: CalibrationConfig, total: int, batch: str) -> set[int]:
    """Which of `total` sampling steps of a batch are kept; 0 is the first, the noisiest.

    timesteps=normal is PTQ4DM's: every batch draws its own, t ~ N(0.4 T, 0.4 T) within [0, T], T the noisiest.
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
    """The recorded calls in order, one in memory at a time."""
    for path in sorted((directory / "calls").glob("*.safetensors")):
        yield load_file(path)
