"""Results that every stage which makes a denoiser writes: its file, its bits, its error by timestep."""

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from vqdm.calibration.calls import call_count, recorded_calls
from vqdm.calibration.recording import OUTPUT, Call, play_back
from vqdm.hub.checkpoint import round_to_stored_
from vqdm.hub.pipelines import save_denoiser
from vqdm.runs import progress
from vqdm.runs.files import write_json
from vqdm.stages.layout import DENOISER, ERRORS_FILE
from vqdm.weights.bits import count_bits


def output_error(denoiser: nn.Module, calls: Iterable[Call], device: str) -> float:
    """Relative squared error of the denoiser's own output on the recorded calls, as stored (16-bit floats)."""
    sums = squared_errors(denoiser, calls, device).values()
    return sum(wrong for wrong, _ in sums) / sum(power for _, power in sums)


def squared_errors(denoiser: nn.Module, calls: Iterable[Call], device: str) -> dict[float, tuple[float, float]]:
    """{timestep: (squared error of the output, squares of the teacher's)}, over the recorded calls."""
    sums: dict[float, tuple[float, float]] = {}
    for call in calls:
        output, target = play_back(denoiser, call, device=device).double(), call[OUTPUT].double()
        timestep = float(call["timestep"].flatten()[0])  # the same for all rows of a call
        wrong, power = sums.get(timestep, (0.0, 0.0))
        sums[timestep] = wrong + float((output - target).square().sum()), power + float(target.square().sum())
    return sums


def finished_denoiser(directory: Path, denoiser: nn.Module, calibration: Path, *, dtype, device: str) -> dict:
    """Write `denoiser/`, with the numbers that its file holds; returns its bits, bytes and output error.

    The error is that of the denoiser as stored, cast to `dtype`, on the calibration's recorded calls.
    """
    bits = count_bits(denoiser)
    round_to_stored_(denoiser)
    nn.Module.to(denoiser, device=device, dtype=dtype)
    error = write_errors(directory, denoiser, calibration, device=device)
    file_bytes = save_denoiser(denoiser, directory / DENOISER, metrics={"relative_output_error_in_calibration": error})
    return {**bits.to_dict(), "file_bytes": file_bytes, "relative_output_error": error}


def write_errors(directory: Path, denoiser: nn.Module, calibration: Path, *, device: str) -> float:
    """Write the denoiser's relative squared error on the recorded calls by timestep; returns that of all calls."""
    calls = progress.over(recorded_calls(calibration), "output error", unit="call", total=call_count(calibration))
    sums = dict(sorted(squared_errors(denoiser, calls, device).items()))
    errors = [wrong / power for wrong, power in sums.values()]
    write_json(directory / ERRORS_FILE, {"timesteps": list(sums), "relative_output_errors": errors})
    return sum(wrong for wrong, _ in sums.values()) / sum(power for _, power in sums.values())
