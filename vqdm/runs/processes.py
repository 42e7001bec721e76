"""The processes of one run, as started by `torchrun` or `accelerate launch`; without these there is just one.

A stage for one process is made by whichever takes the store's lock first; the others wait and find it done.
In distillation all work on one stage (`together`); images and their features are shared out (`opened`, `my_share`).
"""

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from vqdm.errors import UserError
from vqdm.runs.stage import Stage
from vqdm.runs.store import Store

LONGEST_WAIT = datetime.timedelta(days=7)  # for a process that makes a stage alone


def launched() -> bool:
    """True if this is one of several processes; works before torch is imported."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_batch_size(batch_size: int) -> None:
    """UserError unless the processes can share the samples of a step equally."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size % count:
        raise UserError(
            f"finetune.batch_size={batch_size} cannot be shared by {count} processes: give a multiple of {count}"
        )


def is_main() -> bool:
    """True for the one process that logs and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def join(*, cpu: bool) -> None:
    """Meet the others, and take this process's own GPU."""
    if launched():
        from accelerate import PartialState

        PartialState(cpu=cpu, timeout=LONGEST_WAIT)


def leave() -> None:
    """Leave the group of processes; without this they may wait for each other for ever when Python ends."""
    if (group := _group()) is not None:
        group.destroy_process_group()


def _group():
    """torch.distributed where the processes have met; it is not imported for a process that is alone."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def rank_and_count() -> tuple[int, int]:
    group = _group()
    return (0, 1) if group is None else (group.get_rank(), group.get_world_size())


def wait_for_all() -> None:
    if (group := _group()) is not None:
        group.barrier()


def sum_over(tensor):
    """The sum of every process's tensor, in place."""
    if (group := _group()) is not None:
        group.all_reduce(tensor)
    return tensor


def _announced(value):
    """Broadcast the main process's value to all; the other processes pass None."""
    told = [value]
    if (group := _group()) is not None:
        group.broadcast_object_list(told, src=0)
    return told[0]


@contextlib.contextmanager
def opened(store: Store, stage: Stage) -> Iterator[Path]:
    """`Store.open` for a stage that all processes extend: the main one holds its lock until all have done."""
    with store.open(stage) if is_main() else contextlib.nullcontext(store.directory(stage)) as directory:
        wait_for_all()  # the directory is there and clean
        yield directory
        wait_for_all()


def my_share(find_pending: Callable[[], list]) -> list:
    """Every n-th item that the main process finds pending. The others do not look: it may already be writing there."""
    rank, count = rank_and_count()
    return _announced(find_pending() if rank == 0 else None)[rank::count]


def check_agreement(identity: str) -> None:
    """Raise UserError in a process whose result would differ from the main one's; it would wait for ever."""
    if _announced(identity) != identity:
        raise UserError(
            "this process would make something else than the main one: files of models, prompts or metrics' weights "
            "are not the same for both, or came meanwhile; run it again"
        )


def by_main(store: Store, stage: Stage, make: Callable[[Path], dict | None], **options) -> Path:
    """Run `Store.ensure`, with its options, in the main process, while the others wait for it."""
    if is_main():
        store.ensure(stage, make, **options)
    wait_for_all()
    return store.directory(stage)


def together(store: Store, stage: Stage, make: Callable[[Path], dict | None], *, environment: dict) -> Path:
    """Run `Store.ensure` for a stage that all processes make at once.

    All call `make`, and the main one holds the lock.
    """
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
