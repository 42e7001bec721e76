"""Images of a written pipeline in a process that knows nothing else, as a user loads it, with what that takes.

python scripts/sample_saved.py sdxl_random_3bit [--images 2] [--steps 2] [--size 128] [--guidance 5] [--json FILE]
python scripts/sample_saved.py sdxl_random_3bit --write FOLDER      # the images, as 0000.png, 0001.png, …

The pipeline is loaded by diffusers' `DiffusionPipeline.from_pretrained`, by default in bfloat16; quantized layers
decode at every call. An image that is not finite is an error. Printed are the quantized layers by codec, the numbers'
range, CPU-seconds and the process's peak of memory.
"""

import argparse
import collections
from pathlib import Path

from vqdm.runs.command_line import run_script

import torch

import vqdm  # noqa: F401 (makes diffusers know the format)
from vqdm.errors import UserError
from vqdm.models.finite import check_images
from vqdm.models.loader import denoiser_of
from vqdm.models.parts import INDEX
from vqdm.runs.files import write_json
from vqdm.runs.usage import Usage
from vqdm.seeds import torch_generator
from vqdm.weights.layers import quantized_layers

GIB = 2**30
CAPTION = "a photo of a cat"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="a directory that task=compress or save_pretrained wrote")
    parser.add_argument("--caption", default=CAPTION)
    parser.add_argument("--images", type=int, default=2, help="in one batch; default: 2")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, help="pixels of an edge; default: the model's own")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the images there")
    parser.add_argument("--json", type=Path, help="also write what is printed there")
    options = parser.parse_args()
    if min(options.images, options.steps) < 1:
        parser.error("--images and --steps must be at least 1")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    found = sampled(options)
    peak, low, high = found["peak_memory_bytes"], *found["range"]
    codecs = ", ".join(f"{count} by {name}" for name, count in found["layers"].items()) or "none"
    print(f"quantized layers: {codecs}")
    print(f"{options.images} images of {found['size']}², {options.steps} steps: numbers from {low:.3f} to {high:.3f}")
    sizes = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in peak.items() if size is not None)
    print(f"{found['cpu_seconds']:.0f} CPU-seconds with loading; peak of memory: {sizes}")
    if options.json is not None:
        write_json(options.json, found)


def sampled(options: argparse.Namespace) -> dict:
    """Load, sample, and tell of it. UserError for a directory that holds no pipeline, and for images with NaN."""
    from diffusers import DiffusionPipeline

    if not (options.pipeline / INDEX).is_file():
        raise UserError(f"{options.pipeline} holds no {INDEX}: give the directory of a written pipeline")
    used = Usage()
    pipeline = DiffusionPipeline.from_pretrained(
        options.pipeline, dtype=getattr(torch, options.dtype), local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    layers = quantized_layers(denoiser_of(pipeline)).values()
    generators = [torch_generator(0, "sample of a saved pipeline", index) for index in range(options.images)]
    images = pipeline(
        prompt=[options.caption] * options.images,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        height=options.size,
        width=options.size,
        generator=generators,
        output_type="np",
    ).images
    check_images([torch.as_tensor(image) for image in images], [options.caption] * options.images)
    if options.write is not None:
        options.write.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(pipeline.image_processor.numpy_to_pil(images)):
            image.save(options.write / f"{index:04d}.png")
    return {
        "pipeline": str(options.pipeline),
        "layers": dict(collections.Counter(layer.weight.scheme.name for layer in layers)),
        "size": images.shape[1],
        "range": [float(images.min()), float(images.max())],
        **used.so_far(),
    }


if __name__ == "__main__":
    run_script(main)
