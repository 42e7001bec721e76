"""Calls of one denoiser that wait before a layer until all have come there, so that one pass of them serves all layers.

Every call runs in a thread of its own, one at a time. Where a layer is replaced while calls wait before it, they go on
through the new one, as a call made later would.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vqdm.calibration.recording import Call, call_arguments, play
from vqdm.models.live_bytes import LiveBytes


class Lockstep:
    """Context in which `calls` of a denoiser wait before the layers `stops`, given in the order in which they run.

    What lies between two layers of a call stays in memory while it waits. Others may call the denoiser meanwhile.
    """

    def __init__(self, denoiser: nn.Module, calls: Iterable[Call], stops: Iterable[str]):
        self._denoiser, self._device = denoiser, next(denoiser.parameters()).device
        self._layers = {name: denoiser.get_submodule(name) for name in stops}
        self._own = {name: vars(layer).get("forward") for name, layer in self._layers.items()}  # None: its class's
        self._runs = [_Run(partial(self._play, call)) for call in calls]

    def __enter__(self):
        for name, layer in self._layers.items():
            layer.forward = partial(self._stop, name, layer, layer.forward)
        return self

    def __exit__(self, *_):
        for name, layer in self._layers.items():
            del layer.forward
            if self._own[name] is not None:
                layer.forward = self._own[name]
        for run in self._runs:
            run.abandon()

    def inputs_at(self, name: str) -> Iterator[Tensor]:
        """What every call hands to the layer `name`, each going on only when it is asked for.

        ValueError for a call that does not come there.
        """
        for run in self._runs:
            read = run.until(name)
            if read is None:
                raise ValueError(f"the recorded call does not run layer {name} after those before it")
            yield read

    @torch.no_grad()
    def _play(self, call: Call) -> None:
        play(self._denoiser, call_arguments(call, device=self._device))

    def _stop(self, name: str, layer: nn.Module, forward, *args: Any, **kwargs: Any) -> Any:
        """Wait in place of a layer's forward, then run it, or the one that has its place now."""
        run = threading.current_thread()
        if isinstance(run, _Run):
            run.wait_at(name, args[0] if args else next(iter(kwargs.values())))
        now = self._denoiser.get_submodule(name)
        return forward(*args, **kwargs) if now is layer else now(*args, **kwargs)


def waiting_bytes(denoiser: nn.Module, call: Call) -> int:
    """The most bytes that a call has made and still needs where it waits; found by running it."""
    with torch.no_grad(), LiveBytes() as live:
        play(denoiser, call_arguments(call, device=next(denoiser.parameters()).device))
    return live.peak


class _Abandoned(BaseException):
    """Ends a call that nobody needs any more; no error, so that nothing on the way catches it."""


class _Run(threading.Thread):
    """A call that runs only while somebody waits for it. `daemon`: an interrupted process does not wait for it."""

    def __init__(self, play: Callable[[], None]):
        super().__init__(daemon=True)
        self._play, self._go, self._back = play, threading.Semaphore(0), threading.Semaphore(0)
        self._target: str | None = None  # the layer to wait before; None: the call is not to go on
        self._read: Tensor | None = None
        self._error: BaseException | None = None
        self._ended = False

    def until(self, name: str) -> Tensor | None:
        """Let the call go on to the layer `name`; returns what that reads, None if the call ended before."""
        if self._ended:
            return None
        self._target = name
        if self.ident is None:
            self.start()
        else:
            self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        read, self._read = self._read, None
        return read

    def abandon(self) -> None:
        """End the call where it waits, and wait until what it held is free."""
        if self.ident is not None:
            self._target = None
            self._go.release()
            self.join()

    def wait_at(self, name: str, read: Tensor) -> None:
        if name == self._target:
            self._read = read
            self._back.release()
            self._go.acquire()
        if self._target is None:
            raise _Abandoned

    def run(self) -> None:
        try:
            self._play()
        except _Abandoned:
            pass
        except BaseException as error:  # handed to who waits
            self._error = error
        finally:
            self._ended = True
            self._back.release()
