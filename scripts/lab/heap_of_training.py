"""What the C library's heap keeps while a denoiser of SDXL's widths trains on a CPU, which no count of tensors sees.

python scripts/lab/heap_of_training.py [--depth 1] [--steps 1] [--gradients-first] [--trim]

A U-Net by rtn4, with --depth transformer layers where SDXL has ten, makes --steps steps as `finetune` does. Printed are
GiB: resident, over those at the start; of the heap in use and free, as glibc tells (mallinfo2). Last the peak, and
what it is beyond the plan's step, per weight. --gradients-first: gradients are there before the first step; --trim:
free memory goes back to the system after the backward pass of every block.
"""

import argparse
import ctypes
import json
import resource
import time
from pathlib import Path

from vqdm.runs.command_line import run_script

import torch
from torch import nn

from vqdm.calibration.blocks import only_these_train
from vqdm.calibration.recording import play
from vqdm.config.options import FinetuneConfig, ModelConfig
from vqdm.distillation.optimizer import RelativeAdam
from vqdm.distillation.parameters import trained_parameters
from vqdm.models.shipped import named_configs
from vqdm.models.specs import layer_specs
from vqdm.runs.heap import return_freed_memory
from vqdm.runs.usage import Usage
from vqdm.stages.plan.distillation import MOMENTS
from vqdm.stages.plan.forward import denoiser_inputs
from vqdm.stages.plan.training import measure_step, prepare_student
from vqdm.weights.layers import swap_empty
from vqdm.weights.scalar import ScalarScheme

GIB = 2**30
CONFIG = FinetuneConfig(steps=1, batch_size=1, checkpointing=True, precision="bfloat16")
ROWS, SIZE = 2, 128  # under guidance; pixels
BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")


class Heap(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]


def student_on_meta(depth: int) -> nn.Module:
    from diffusers import UNet2DConditionModel

    config = json.loads((named_configs("sdxl") / "unet/config.json").read_bytes())
    config["transformer_layers_per_block"] = [1, 2, depth]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    specs = layer_specs(unet, pattern=ModelConfig.layers, min_size=ModelConfig.min_size)
    return swap_empty(unet, [(spec, ScalarScheme(codec="rtn", bits=4)) for spec in specs])


def student_on_cpu(depth: int) -> nn.Module:
    """The same in fp32, with small numbers in place of weights: only where they lie matters."""
    unet = nn.Module.to(student_on_meta(depth).to_empty(device="cpu"), dtype=torch.float32).eval()
    for name, parameter in unet.named_parameters():
        parameter.data.fill_(0.0 if name.endswith("zeros") else 0.01)
    for buffer in unet.buffers():
        buffer.fill_(0x77)
    return unet


def planned(depth: int) -> tuple[int, float]:
    """The number of weights, and the bytes of a step and of Adam's moments by the plan."""
    student = prepare_student(student_on_meta(depth), CONFIG)
    step = measure_step(student, CONFIG, rows=ROWS, rows_each=ROWS, size=SIZE, device="cpu", accumulates=False)
    return student.weights, step.step + 4 * MOMENTS * student.trained


def train(unet: nn.Module, *, steps: int, gradients_first: bool, trim: bool) -> int:
    """Returns the peak of resident bytes over those at the start, and prints the heap's state along the way."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Heap
    trained = trained_parameters(unet, CONFIG.train)
    optimizer = RelativeAdam((part.parameter, part.unit) for part in trained)
    if gradients_first:
        for part in trained:
            part.parameter.grad = torch.zeros_like(part.parameter)
    if trim:
        for module in unet.modules():
            if type(module).__name__ in BLOCKS:
                module.register_full_backward_hook(lambda *_: return_freed_memory())
    unet.enable_gradient_checkpointing()
    arguments = denoiser_inputs(unet, batch=ROWS, size=SIZE)
    return_freed_memory()
    used = Usage()
    start = resident()

    def say(what: str) -> None:
        heap = mallinfo()
        print(
            f"{what}: resident {(resident() - start) / GIB:+.2f}, heap in use {heap.uordblks / GIB:.2f}, "
            f"free {heap.fordblks / GIB:.2f} in {heap.ordblks:,} pieces, {heap.keepcost / GIB:.2f} of it at its end",
            flush=True,
        )

    say("start")
    with only_these_train(unet, [part.parameter for part in trained]):
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16):
                loss = play(unet, arguments).float().square().mean()
            say("forward")
            loss.backward()
            say("backward")
            optimizer.step()
            optimizer.zero_grad(set_to_none=not gradients_first)
    found = used.so_far()
    print(f"{found['cpu_seconds']:.0f} CPU-seconds, {time.process_time():.0f} with what went before")
    return found["peak_memory_bytes"]["host"] - start


def resident() -> int:
    return resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--gradients-first", action="store_true")
    parser.add_argument("--trim", action="store_true")
    options = parser.parse_args()
    weights, step = planned(options.depth)
    peak = train(
        student_on_cpu(options.depth), steps=options.steps, gradients_first=options.gradients_first, trim=options.trim
    )
    print(
        f"{weights / 1e9:.2f} billion weights; peak {peak / GIB:.2f}, plan's step {step / GIB:.2f}: "
        f"{(peak - step) / weights:.2f} bytes a weight beyond it"
    )


if __name__ == "__main__":
    run_script(main)
