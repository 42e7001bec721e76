"""Calibration: prompts with ids, and calls of the full-precision denoiser recorded while they are sampled.

Every quantizer of the model reads the same directory: `prompts.jsonl` and `calls/<batch>-<step>.safetensors`.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save as to_bytes

from vqdm.calibration.calls import recorded_positions, sample_batches, token_limit
from vqdm.calibration.recording import Recorder
from vqdm.config.options import CalibrationConfig, SamplerConfig
from vqdm.models.loader import denoiser_of
from vqdm.prompts import Prompt, PromptList, one_line, token_report
from vqdm.runs.files import atomic_write
from vqdm.runs.items import make_missing

log = logging.getLogger("vqdm")


def calibrate(
    directory: Path, pipeline, prompts: PromptList, *, config: CalibrationConfig, sampler: SamplerConfig
) -> dict:
    """Fill the stage's directory; existing batches are kept. Returns the manifest's summary."""
    atomic_write(directory / "prompts.jsonl", prompts.to_jsonl())
    tokens = token_report(prompts, pipeline.tokenizer, token_limit(pipeline))
    strange = tokens["unknown"] or tokens["truncated_prompts"]
    log.log(logging.INFO if strange else logging.DEBUG, "calibration: %s; %s", prompts.origin, one_line(tokens))

    def record(name: str, captions: list[Prompt], run: Callable[[], None]) -> tuple[dict[str, bytes], dict]:
        with Recorder(denoiser_of(pipeline), steps=recorded_positions(config, sampler.steps, name)) as recorder:
            run()
        files = {f"calls/{name}-{i:02d}.safetensors": to_bytes(call) for i, call in enumerate(recorder.calls)}
        return files, {"prompts": [p.id for p in captions], "calls": len(recorder.calls)}

    batches = sample_batches(pipeline, prompts, config=config, sampler=sampler)
    make_missing(directory, {batch[0]: functools.partial(record, *batch) for batch in batches}, title="calibrate")
    return {"origin": prompts.origin, "prompts_sha256": prompts.sha256, "tokens": tokens}
