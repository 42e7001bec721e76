"""Tune the blocks of a quantized denoiser one after the other; every block is an item."""

import dataclasses
from pathlib import Path

from safetensors.torch import load
from safetensors.torch import save as to_bytes
from torch import nn

from vqdm.calibration.blocks import Block, blocks_of
from vqdm.calibration.calls import recorded_calls
from vqdm.config.options import FinetuneConfig
from vqdm.distillation.blockwise import Changed, tune_blocks
from vqdm.models.loader import denoiser_of
from vqdm.runs import progress
from vqdm.runs.device import one_thread_each
from vqdm.runs.files import write_json
from vqdm.runs.heap import return_free_pages
from vqdm.runs.items import read_item, write_item
from vqdm.stages.finished import finished_denoiser
from vqdm.weights.layers import quantized_layers


def tune_all_blocks(
    directory: Path, pipeline, teacher: nn.Module, calibration: Path, *, config: FinetuneConfig, device: str
) -> dict:
    """Fill the stage's directory: `denoiser/`, `blocks.json`. Returns bits, bytes and output error.

    pipeline: its denoiser is the student, in fp32, tuned in place. teacher: in full precision; both on `device`.
    """
    student = denoiser_of(pipeline)
    specs = [layer.spec for layer in quantized_layers(student).values()]

    def stored(block: Block) -> Changed | None:
        if read_item(directory, block.name) is None:
            return None
        return load((directory / _file(block)).read_bytes())

    names = [block.name for block in blocks_of(teacher, specs, next(recorded_calls(calibration)))]
    with one_thread_each(), progress.bar("tune", len(names), unit="block") as bar:
        for block, changed, report in tune_blocks(
            student,
            teacher,
            specs,
            lambda: recorded_calls(calibration),
            config=config,
            stored=stored,
            progress=lambda block, step, loss: bar.partly(step / config.block_steps, f"loss {loss:.4f}"),
        ):
            if report is None:
                bar.skip()
            else:
                content = to_bytes({name: tensor.cpu().contiguous() for name, tensor in changed.items()})
                write_item(directory, block.name, {_file(block): content}, dataclasses.asdict(report))
                bar.add()
            return_free_pages()  # the heap would keep them in pieces, gigabytes after a hundred blocks of SDXL
    reports = [{"block": name, **read_item(directory, name)} for name in names]
    write_json(directory / "blocks.json", reports)
    kept = sum(report["kept"] for report in reports)
    dtype = next(teacher.parameters()).dtype
    found = finished_denoiser(directory, student, calibration, dtype=dtype, device=device)
    return found | {"blocks": len(reports), "blocks_better": kept}


def _file(block: Block) -> str:
    return f"blocks/{block.name}.safetensors"
