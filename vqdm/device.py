"""Which device, and why: decided once, printed, and kept in every manifest."""

import dataclasses

from vqdm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Device:
    name: str  # cpu | cuda
    reason: str
    threads: int

    def __str__(self) -> str:
        return f"device {self.name} ({self.reason}), {self.threads} threads"


def resolve_device(wanted: str, *, threads: int | None) -> Device:
    """`auto` takes a GPU where torch sees one; also sets torch's CPU threads."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError(
            f"device=cuda, but torch {torch.__version__} sees no GPU; use device=cpu or install a CUDA build"
        )
    name = "cuda" if there and wanted != "cpu" else "cpu"
    reason = f"device={wanted}" if wanted != "auto" else ("torch sees a GPU" if there else "torch sees no GPU")
    return Device(name, reason, torch.get_num_threads())
