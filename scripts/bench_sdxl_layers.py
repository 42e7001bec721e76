"""Time to quantize SDXL by trellis codes, with Hessians given: every shape of layer once, times their number.

python scripts/bench_sdxl_layers.py [--workers 2] [--bits 3] [--shapes 1280x1280,1280x5120]

Shapes are [out, in] of the matrix that is encoded, kernel taps among the inputs. Weights are random, so are Hessians
(log-normal diagonal plus low rank). Shapes run in as many threads as there are workers, the largest first, as in
vqdm/stages/quantize.py. Every finished shape is a row of results/tables/bench_sdxl_layers.csv: stop it and start it
again, and it goes on; delete the file to start over. The largest Hessians need 8 GiB of memory per worker.
"""

import argparse
import concurrent.futures
import sys
import time
from collections import Counter
from pathlib import Path

from vqdm.runs.command_line import run_script

import pandas as pd
import torch
from bench_codecs import Settings, encode, warm_trellis
from torch import Tensor
from tqdm import tqdm

from vqdm.config.codecs import TrellisConfig
from vqdm.errors import UserError
from vqdm.models.shipped import shipped_configs
from vqdm.models.single_file import component_on_meta
from vqdm.models.specs import layer_specs
from vqdm.runs.device import one_thread_each
from vqdm.runs.files import atomic_write
from vqdm.seeds import torch_generator

RANK = 64  # of the random Hessians beside their diagonal
Shape = tuple[int, int]


def sdxl_shapes() -> Counter[Shape]:
    """How many of SDXL's layers that are quantized have each shape."""
    unet = component_on_meta(shipped_configs("sdxl") / "unet")
    return Counter(spec.shape for spec in layer_specs(unet))


def read_shapes(file: Path) -> Counter[Shape]:
    """The same from a CSV with columns out, in (channels), k (kernel size) and count. UserError for any other file."""
    try:
        table = pd.read_csv(file)
        rows = zip(table["out"], table["in"] * table["k"] ** 2, table["count"], strict=True)
        shapes = Counter()
        for out, size, count in rows:
            shapes[int(out), int(size)] += int(count)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--layers {file} is no CSV with columns out, in, k and count: {error!r}") from error
    return shapes


def chosen_shapes(given: str | None, shapes: Counter[Shape]) -> list[Shape]:
    """The shapes asked for, or all, the largest first."""
    names = {f"{out}x{size}": (out, size) for out, size in sorted(shapes, key=lambda shape: -shape[0] * shape[1])}
    wanted = given.split(",") if given else list(names)
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise UserError(f"--shapes: no layer is {unknown[0]}; there are {', '.join(names)}")
    return [shape for name, shape in names.items() if name in wanted]


def random_problem(shape: Shape) -> tuple[Tensor, Tensor]:
    """A Gaussian weight [out, in] and a Hessian [in, in] of condition below 10⁴, in seconds at any size."""
    out, size = shape
    draw = torch_generator(0, "SDXL layer", f"{out}x{size}")
    weight = torch.randn(out, size, generator=draw) / size**0.5
    spread = torch.linspace(1, 0.1, RANK) / RANK**0.5
    factor = torch.randn(size, RANK, generator=draw) * spread
    hessian = factor @ factor.T
    hessian.diagonal().add_(torch.exp(0.7 * torch.randn(size, generator=draw)))
    return weight, hessian


def time_shape(shape: Shape, bits: float, damping: float) -> tuple[float, float]:
    """Seconds by the clock, and of the CPU of this thread, for one layer."""
    weight, hessian = random_problem(shape)
    began, cpu_began = time.monotonic(), time.thread_time()
    encode("trellis", weight, hessian, bits, Settings(damping=damping), layer=f"{shape[0]}x{shape[1]}")
    return time.monotonic() - began, time.thread_time() - cpu_began


KEYS = ["out", "in", "bits", "damping", "workers"]


def run(options: argparse.Namespace) -> None:
    shapes = sdxl_shapes() if options.layers is None else read_shapes(options.layers)
    wanted = chosen_shapes(options.shapes, shapes)
    if options.workers < 1:
        raise UserError(f"--workers must be at least 1, not {options.workers}")
    file = options.results / "tables" / "bench_sdxl_layers.csv"
    rows = pd.read_csv(file).to_dict("records") if file.is_file() else []
    settings = (options.bits, options.damping, options.workers)
    done = {tuple(row[key] for key in KEYS) for row in rows}
    missing = [shape for shape in wanted if (*shape, *settings) not in done]
    with (
        tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc="encode", unit="shape") as progress,
        one_thread_each(),
        concurrent.futures.ThreadPoolExecutor(options.workers) as pool,
    ):
        if missing:
            warm_trellis()
        futures = {pool.submit(time_shape, shape, options.bits, options.damping): shape for shape in missing}
        try:
            for future in concurrent.futures.as_completed(futures):
                shape, (seconds, cpu) = futures[future], future.result()
                row = dict(zip(KEYS, (*shape, *settings), strict=True))
                rows.append(row | {"count": shapes[shape], "seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3)})
                atomic_write(file, pd.DataFrame(rows).to_csv(index=False).encode())
                tqdm.write(f"{shape[0]:>6} x {shape[1]:<6} {shapes[shape]:>4} layers  {seconds:8.2f} s each")
                sys.stdout.flush()
                progress.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print(summary(rows, wanted, shapes, bits=options.bits, damping=options.damping))


def summary(rows: list[dict], wanted: list[Shape], shapes: Counter[Shape], *, bits: float, damping: float) -> str:
    """Minutes for all layers of the wanted shapes, for every number of workers that all of them were timed with."""
    layers, weights = sum(shapes[s] for s in wanted), sum(shapes[s] * s[0] * s[1] for s in wanted)
    lines = [f"{layers} layers, {weights / 1e9:.3f} billion weights, {bits:g} bits:"]
    alike = [row for row in rows if (row["bits"], row["damping"]) == (bits, damping)]
    for workers in sorted({row["workers"] for row in alike}):
        seconds = {(row["out"], row["in"]): row["seconds"] for row in alike if row["workers"] == workers}
        if all(shape in seconds for shape in wanted):
            minutes = sum(shapes[shape] * seconds[shape] for shape in wanted) / workers / 60
            lines.append(f"{workers} worker{'s' if workers > 1 else ''}: {minutes:.2f} minutes")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--layers",
        type=Path,
        metavar="CSV",
        help="shapes: columns out, in, k, count; default: SDXL's U-Net",
    )
    add("--shapes", metavar="OUTxIN,…", help="these only")
    add("--bits", type=float, default=3.0)
    add("--damping", type=float, default=TrellisConfig.damping)
    add("--workers", type=int, default=1)
    add("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    try:
        run(options)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_script(main)
