"""Write a diffusers SDXL-type pipeline directory as one `.safetensors` file with the original key names.

python scripts/to_single_file.py vqdm/models/tiny tiny.safetensors --fp16

The names and layouts follow from the directory's configs. `vqdm.models.single_file.load_single_file` reads the file
back bit for bit; configs, scheduler and tokenizers stay in the directory, whose path it takes as `configs`.
"""

import argparse
import secrets
import sys
from pathlib import Path

from vqdm.runs.command_line import run_script

import torch
from safetensors.torch import save_file

from vqdm.errors import UserError
from vqdm.models.finite import check_finite
from vqdm.models.foreign import loading
from vqdm.models.location import check_pipeline_directory
from vqdm.models.original_keys import COMPONENTS, to_original
from vqdm.models.parts import check_parts
from vqdm.runs.files import TEMPORARY_SUFFIX, full_disk_is_mendable


def original_weights(directory: Path, *, dtype: torch.dtype, variant: str | None = None) -> dict[str, torch.Tensor]:
    """{original key: tensor} of the U-Net, the VAE and both text encoders."""
    from diffusers import DiffusionPipeline

    check_parts(check_pipeline_directory(directory), variant=variant)
    with loading(directory):
        pipeline = DiffusionPipeline.from_pretrained(
            directory, dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True
        )
    check_finite(pipeline, directory)
    absent = [name for name in COMPONENTS if getattr(pipeline, name, None) is None]
    if absent:
        raise UserError(f"{directory} has no {', '.join(absent)}; give an SDXL-type pipeline directory")
    weights = {}
    for name in COMPONENTS:
        component = getattr(pipeline, name)
        weights |= to_original(name, component.state_dict(), component.config)
    return {key: weight.contiguous() for key, weight in weights.items()}


def write_single_file(directory: Path, file: Path, *, dtype: torch.dtype, variant: str | None = None) -> None:
    """Write beside `file`, then rename over it: 7 GB take a while, and half a file must not look like one."""
    if file.suffix != ".safetensors":
        raise UserError(f"{file} must be named *.safetensors")
    weights = original_weights(directory, dtype=dtype, variant=variant)
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with full_disk_is_mendable(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(weights, temporary, metadata={"format": "pt"})
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a diffusers pipeline directory")
    parser.add_argument("file", type=Path, help="the .safetensors file to write")
    parser.add_argument("--fp16", action="store_true", help="store 16-bit floats (default: 32-bit)")
    parser.add_argument("--variant", help="read the directory's files of this variant, e.g. fp16")
    options = parser.parse_args()
    dtype = torch.float16 if options.fp16 else torch.float32
    try:
        write_single_file(options.directory, options.file, dtype=dtype, variant=options.variant)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.file}, {options.file.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    run_script(main)
