"""Calibration: prompts with ids, and calls of the full-precision denoiser recorded while it samples them.

Every quantizer of the model reads the same directory: `prompts.jsonl` and `calls/<batch>-<step>.safetensors`.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from tqdm import tqdm

from vqdm.config import CalibrationConfig, SamplerConfig
from vqdm.models.loader import denoiser_of, sample
from vqdm.models.recording import Call, Recorder, evenly_spread
from vqdm.prompts import PromptList, one_line, token_report
from vqdm.seeds import torch_generator
from vqdm.stages.layout import batches
from vqdm.store import atomic_write, read_item, write_item

log = logging.getLogger("vqdm")


def calibrate(
    directory: Path, pipeline, prompts: PromptList, *, config: CalibrationConfig, sampler: SamplerConfig
) -> dict:
    """Fill the stage's directory; batches that are there are kept. Returns what the manifest should say."""
    atomic_write(directory / "prompts.jsonl", prompts.to_jsonl())
    tokens = token_report(prompts, pipeline.tokenizer, pipeline.tokenizer.model_max_length)
    log.info("calibration: %s; %s", prompts.origin, one_line(tokens))
    steps = evenly_spread(sampler.steps, config.recorded_steps)
    for name, rows in tqdm(batches(len(prompts), config.batch_size), desc="calibrate", unit="batch"):
        if read_item(directory, name) is None:
            batch = prompts.prompts[rows.start : rows.stop]
            generators = [torch_generator(config.noise_seed, "calibration", p.id) for p in batch]
            with Recorder(denoiser_of(pipeline), steps=steps) as recorder:
                sample(pipeline, [p.text for p in batch], sampler=sampler, generators=generators, output="latent")
            files = {f"calls/{name}-{i:02d}.safetensors": to_bytes(call) for i, call in enumerate(recorder.calls)}
            write_item(directory, name, files, {"prompts": [p.id for p in batch], "calls": len(recorder.calls)})
    return {"origin": prompts.origin, "prompts_sha256": prompts.sha256, "tokens": tokens}


def recorded_calls(directory: Path) -> Iterator[Call]:
    """The recorded calls in order, one in memory at a time."""
    for path in sorted((directory / "calls").glob("*.safetensors")):
        yield load_file(path)
