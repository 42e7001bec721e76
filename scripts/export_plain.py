"""Turn a compressed pipeline into a plain one: every layer decoded, 16 bit, for tools that know nothing of vqdm.

python scripts/export_plain.py my_model_3bit my_model_plain
"""

import argparse
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

import torch

from vqdm.errors import UserError
from vqdm.hub.pipelines import check_saved, naming, quiet_diffusers
from vqdm.models.finite import check_finite
from vqdm.models.foreign import json_object, loading
from vqdm.models.loader import denoiser_of
from vqdm.models.location import check_pipeline_directory, denoiser_directory
from vqdm.models.parts import check_parts


def export_plain(source: Path, target: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write the pipeline of `source` with its denoiser decoded to `target`, which must not exist."""
    from diffusers import DiffusionPipeline  # after vqdm, which lets torchvision be imported

    if target.exists():
        raise UserError(f"{target} exists already; give another place")
    part = denoiser_directory(check_parts(check_pipeline_directory(source)))
    if not json_object(part / "config.json").get("quantization_config"):
        raise UserError(f"{source} is not quantized: it is a plain pipeline already")
    check_saved(part)
    with quiet_diffusers():
        with naming(source), loading(source, "a compressed pipeline"):
            pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype, local_files_only=True)
        denoiser_of(pipeline).dequantize()
        check_finite(pipeline, source)
        pipeline.save_pretrained(target)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a pipeline directory that vqdm has written")
    parser.add_argument("target", type=Path, help="the directory to write")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    options = parser.parse_args(arguments)
    try:
        export_plain(options.source, options.target, dtype=getattr(torch, options.dtype))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.target}")


if __name__ == "__main__":
    run_script(main)
