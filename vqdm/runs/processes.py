"""The processes of one run, started by `torchrun` or `accelerate launch`; without these there is one.

A stage that one process can make is made by whichever takes the store's lock first; the others wait and find it done.
Distillation works on one stage together: `together`. Images and their features are shared out: `opened`, `my_share`.
"""

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from vqdm.errors import UserError
from vqdm.runs.store import Stage, Store

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
    """What the main process says; the others give None."""
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
    """Every n-th of what the main process finds to do. The others do not look: it may be writing there by then."""
    rank, count = rank_and_count()
    return _announced(find_pending() if rank == 0 else None)[rank::count]


def check_agreement(identity: str) -> None:
    """UserError in a process that would make something else than the main one, and so wait for it for ever."""
    if _announced(identity) != identity:
        raise UserError(
            "this process would make something else than the main one: files of models, prompts or metrics' weights "
            "are not the same for both, or came meanwhile; run it again"
        )


def by_main(store: Store, stage: Stage, make: Callable[[Path], dict | None], **options) -> Path:
    """`Store.ensure`, with its options, by the main process, which the others wait for."""
    if is_main():
        store.ensure(stage, make, **options)
    wait_for_all()
    return store.directory(stage)


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
