"""Second moments of what a layer reads in two denoisers at once, and targets corrected for what stands before it.

GPTAQ (Li et al. 2025, arXiv 2504.02692) asks a quantized layer to give what the original gives for ITS input x, when it
reads x̃ behind layers that are quantized already: min ‖W x − Q x̃‖². With H̃ = E[x̃ x̃ᵀ] and C = E[x x̃ᵀ] this is the
usual problem with the Hessian H̃ for the weights W + W (C − H̃) (H̃ + λ)⁻¹, so that any codec solves it.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from vqdm.calibration.hessian import drawn_tokens, token_count, tokens_of
from vqdm.calibration.lockstep import Lockstep
from vqdm.calibration.recording import Call, call_arguments, play
from vqdm.models.specs import LayerSpec
from vqdm.runs.device import exact_tf32, one_thread_each
from vqdm.seeds import torch_generator

DAMPING = 0.01  # what is not seen in calibration stays as it is


class _Enough(Exception):
    """Every layer has read its input: the rest of the call is not needed."""


class _Inputs:
    """Context that says what some layers read in a call, which it ends when the last of them has read."""

    def __init__(self, denoiser: nn.Module, specs: list[LayerSpec]):
        self.denoiser, self.specs, self._read = denoiser, specs, {}
        self._hooks: list = []

    def __enter__(self):
        for spec in self.specs:
            layer = self.denoiser.get_submodule(spec.name)
            self._hooks.append(layer.register_forward_pre_hook(partial(self._keep, spec), with_kwargs=True))
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()

    def _keep(self, spec: LayerSpec, _layer, args: tuple, kwargs: dict) -> None:
        self._read[spec.name] = args[0] if args else next(iter(kwargs.values()))
        if len(self._read) == len(self.specs):
            raise _Enough

    @torch.no_grad()
    def of_call(self, call: Call) -> dict[str, Tensor]:
        self._read = {}
        with contextlib.suppress(_Enough):
            play(self.denoiser, call_arguments(call, device=next(self.denoiser.parameters()).device))
        return self._read


def same_inputs(denoiser: nn.Module, specs: list[LayerSpec], call: Call) -> list[list[LayerSpec]]:
    """The layers, given in the order in which they run, divided where the next one reads another tensor.

    Layers that each corrected the same error of what they read together would correct it several times.
    """
    with _Inputs(denoiser, specs) as inputs:
        read = inputs.of_call(call)
    return [list(layers) for _, layers in itertools.groupby(specs, key=lambda spec: id(read[spec.name]))]


class PairedInputs:
    """Context that says what a layer reads in two denoisers, call after call, for one layer after the other.

    The first `held` calls wait from layer to layer, where they keep what they have in memory; all others begin anew for
    every layer. What is read is the same. stops: the layers that will be asked for, in the order in which they run.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        calls: Callable[[], Iterable[Call]],
        stops: list[LayerSpec],
        *,
        held: int,
    ):
        self._denoisers, self._calls, self._held = (teacher, student), calls, held
        waiting, names = list(itertools.islice(calls(), held)), [spec.name for spec in stops]
        self._waiting = [Lockstep(denoiser, waiting, names) for denoiser in self._denoisers]

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            for calls in self._waiting:
                stack.enter_context(calls)
            self._leave = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._leave.close()

    def of(self, spec: LayerSpec) -> Iterator[tuple[Tensor, Tensor]]:
        """(what the layer reads in the teacher, in the student) of every call."""
        yield from zip(*(calls.inputs_at(spec.name) for calls in self._waiting), strict=True)
        with _Inputs(self._denoisers[0], [spec]) as wanted, _Inputs(self._denoisers[1], [spec]) as found:
            for call in itertools.islice(self._calls(), self._held, None):
                yield wanted.of_call(call)[spec.name], found.of_call(call)[spec.name]


def pair_moments(
    specs: list[LayerSpec],
    inputs: Iterable[tuple[Tensor, Tensor]],
    *,
    tokens_per_call: int | None = None,
    seed: int = 0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per layer (H̃, C), fp32 [in, in]: means of x̃ x̃ᵀ and x x̃ᵀ, x read in the teacher and x̃ in the student.

    specs: layers that read one tensor in each of the two; with equal geometry they share their moments. inputs: (x, x̃)
    of every call. tokens_per_call: as `HessianRecorder` takes it, the same tokens for both.
    """
    sums = {spec.conv: _Sums(spec) for spec in specs}
    with one_thread_each():
        for number, (clean, own) in enumerate(inputs):
            for one in sums.values():
                draw = torch_generator(seed, f"pairs/{one.spec.name}", number)
                one.add(clean, own, tokens_per_call, draw)
    return {spec.name: sums[spec.conv].means() for spec in specs}


class _Sums:
    """Sums over the tokens that layers of one geometry read."""

    def __init__(self, spec: LayerSpec):
        self.spec, self.moment, self.cross, self.tokens = spec, 0.0, 0.0, 0.0

    def add(self, clean: Tensor, own: Tensor, limit: int | None, draw: torch.Generator) -> None:
        conv, count = self.spec.conv, token_count(own, self.spec.conv)
        chosen = drawn_tokens(count, limit, draw, own.device)
        weight = 1.0 if chosen is None else count / len(chosen)
        for x, read in zip(tokens_of(clean, conv, chosen), tokens_of(own, conv, chosen), strict=True):
            with exact_tf32(own.dtype):
                self.moment = self.moment + weight * (read.T @ read)
                self.cross = self.cross + weight * (x.T @ read)
        self.tokens += count

    def means(self) -> tuple[Tensor, Tensor]:
        return self.moment / self.tokens, self.cross / self.tokens


def corrected_target(matrix: Tensor, moment: Tensor, cross: Tensor) -> Tensor:
    """The weights T [out, in] that a codec with the Hessian `moment` is to come near to.

    They minimise E‖W x − T x̃‖² + λ‖T − W‖² with λ = DAMPING × the mean of the moment's diagonal.
    """
    ridge = DAMPING * moment.diagonal().mean().clamp(min=1e-12)
    damped = moment + ridge * torch.eye(len(moment), device=moment.device)
    return matrix + torch.linalg.solve(damped, (matrix @ (cross - moment)).T).T
