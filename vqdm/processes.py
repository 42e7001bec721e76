"""The processes of one run, started by `torchrun` or `accelerate launch`; without these there is one.

A stage that one process can make is made by whichever takes the store's lock first; the others wait and find it done.
Only distillation works on one stage together: `together`.
"""

import datetime
import os
from collections.abc import Callable
from pathlib import Path

from vqdm.errors import UserError
from vqdm.store import Stage, Store

LONGEST_WAIT = datetime.timedelta(days=7)  # for a process that makes a stage alone


def launched() -> bool:
    """Whether there are others; before torch is imported."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_batch_size(batch_size: int) -> None:
    """UserError unless the processes can share the samples of a step equally."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size % count:
        raise UserError(
            f"finetune.batch_size={batch_size} cannot be shared by {count} processes: give a multiple of {count}"
        )


def is_main() -> bool:
    """Whether this one speaks and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def join(*, cpu: bool) -> None:
    """Meet the others, and take this process's own GPU."""
    if launched():
        from accelerate import PartialState

        PartialState(cpu=cpu, timeout=LONGEST_WAIT)


def leave() -> None:
    """Part from the others; without it they may wait for each other for ever when Python ends."""
    if launched():
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def rank_and_count() -> tuple[int, int]:
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def sum_over(tensor):
    """The sum of every process's tensor, in place."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def _announced(value: bool | None) -> bool:
    """What the main process says; the others give None."""
    import torch.distributed as dist

    told = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    return bool(told[0])


def together(store: Store, stage: Stage, make: Callable[[Path], dict | None], *, environment: dict) -> Path:
    """`Store.ensure` for a stage that all processes make at once: they all call `make`, the main one with the lock."""
    if not is_main():
        directory = store.directory(stage)
        if _announced(None):
            make(directory)
        wait_for_all()
        return directory
    began = False

    def lead(directory: Path) -> dict | None:
        nonlocal began
        began = _announced(True)
        return make(directory)

    directory = store.ensure(stage, lead, environment=environment)
    if not began:
        _announced(False)
    wait_for_all()
    return directory
