"""What a run shows while it works: a line on the whole, one bar at a time. Where no terminal looks on, plain lines.

    with progress.whole(["full precision", "RTN 4 bit"], {fingerprint: "generate", …}) as begin_row:
        begin_row(0)
        with progress.making("generate", fingerprint):       # a stage of that kind, whose time tells of the others'
            for batch in progress.over(batches, "generate", unit="batch"):
                …
    with progress.bar("quantize", weights, count=118, unit="layer") as bar:
        bar.add(layer.size)
    with progress.step("loading tiny"):                      # of a length that nobody knows
        …

Bars may lie in each other: the inner one is shown, and its time is not the outer one's. All may be called from any
thread. Imports no torch.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from vqdm.runs.texts import duration

WIDTH = "VQDM_TERMINAL"  # in a sweep's job: the columns of the terminal to which its lines are passed on
JOB = "VQDM_JOB"  # in a sweep's job: which one it is, "job 2 of 3"
EVERY, PLAIN_EVERY = 0.1, 20.0  # seconds between two drawings, and between two plain lines
SHORT = {"features": 0.03, "evaluate": 0.05}  # what a stage of a kind takes by that of another, before any was seen
EARLY = 0.1  # part of a bar after which its first estimate is kept
log = logging.getLogger("vqdm")
_lock = threading.RLock()


class Bar:
    """One piece of work of a known amount, such as the weights of all layers; `count` items of `unit` make it up."""

    def __init__(self, what: str, total: float | None, *, count: int | None = None, unit: str = "", apart: bool = True):
        self.what, self.total, self.unit, self.apart = what, total, unit, apart
        self.count = total if count is None else count
        self.done, self.items, self.note, self.foreseen = 0.0, 0, "", None
        self._partly = 0.0  # amount done of an item that is not whole
        self._skipped, self._began = 0.0, time.monotonic()
        self._last = self._said = self._began
        self._inner = 0.0  # seconds of bars inside this one
        self._took, self._running = 0.0, {}  # seconds of items that said when they began; and when those at work did
        self._worked, self._since = 0.0, 0.0  # seconds in which any of these was at work; and since when one is
        self._first, self._first_took, self._first_done = set(), 0.0, 0.0  # those begun before any was done

    def begin(self, item: str) -> None:
        """Note when an item begins, where several are made side by side: those at work count for the time left."""
        with _lock:
            now = time.monotonic()
            self._since = self._since if self._running else now
            self._running[item] = now
            if not self._took:
                self._first.add(item)

    def add(self, amount: float = 1, *, items: int = 1, note: str = "", item: str | None = None) -> None:
        """Count what is done: an item, which may have been begun."""
        with _lock:
            if item in self._running:
                took = time.monotonic() - self._running.pop(item)
                self._took += took
                if item in self._first:
                    self._first_took, self._first_done = self._first_took + took, self._first_done + amount
                self._worked += 0 if self._running else time.monotonic() - self._since
            self.done, self.items, self._partly = self.done - self._partly + amount, self.items + items, 0.0
            self._look(note)

    def partly(self, amount: float, note: str = "") -> None:
        """Count what is done so far of the item at work."""
        with _lock:
            self.done, self._partly = self.done - self._partly + amount, amount
            self._look(note)

    def _look(self, note: str) -> None:
        self.note, self._last = note, time.monotonic()
        if self.foreseen is None and self.total and self._own() > 0 and self.part() >= EARLY:
            self.foreseen = self.seconds() + (self.left() or 0.0)
        _screen.draw()

    def skip(self, amount: float = 1, *, items: int = 1) -> None:
        """Count what was there before, and so says nothing about the time."""
        with _lock:
            self._skipped += amount
            self.add(amount, items=items)

    def seconds(self, until: float | None = None) -> float:
        """Seconds of the bar's own so far, without those of bars inside."""
        return (time.monotonic() if until is None else until) - self._began - self._inner

    def _own(self) -> float:
        return self.done - self._skipped

    def part(self) -> float:
        """Part that is done of what was to do."""
        left = (self.total or 0) - self._skipped
        return self._own() / left if left > 0 else 1.0

    def left(self) -> float | None:
        """Seconds that are left at the rate so far, which is known when something is done."""
        if not self.total or self._own() <= 0:
            return None
        if self._took:
            now = time.monotonic()
            at_work = sum(now - began for began in self._running.values())
            worked = self._worked + (now - self._since if self._running else 0)
            side_by_side = (self._took + at_work) / max(worked, 1e-9)
            took, done = self._took - self._first_took, self._own() - self._first_done
            if done <= 0:  # else without the first ones, which also warm up
                took, done = self._took, self._own()
            return max(0.0, took / done * (self.total - self.done) - at_work) / side_by_side
        whole = self.seconds(self._last) / self.part()
        return max(0.0, whole - self.seconds())

    def pause(self, seconds: float) -> None:
        """Leave out the seconds of a bar inside, which all that is at work has waited for."""
        self._inner, self._said = self._inner + seconds, self._said + seconds
        self._since += seconds
        self._running = {item: began + seconds for item, began in self._running.items()}

    def text(self, width: int) -> str:
        if self.total is None:
            return f"{self.what} …"[:width]
        left = self.left()
        counted = f"{self.items} of {counted_in(self.count, self.unit)}"
        after = ", ".join(filter(None, (counted, "" if left is None else f"{duration(left)} left", self.note)))
        ascii_only = not (getattr(sys.stderr, "encoding", None) or "").lower().startswith("utf")
        return tqdm.format_meter(
            min(self.done, self.total), self.total, 1, ncols=width, ascii=ascii_only, prefix=self.what,
            bar_format=f"{{desc}} {{percentage:3.0f}}% |{{bar}}| {after.replace('{', '(').replace('}', ')')}",
        )  # fmt: skip


def counted_in(count: float, unit: str) -> str:
    """A count with its unit: 1 batch, 8 batches, 118 layers."""
    return f"{count:g} {unit}" + ("" if count == 1 else "es" if unit.endswith("ch") else "s")


class Whole:
    """All rows of a command, and the stages that they still need: {fingerprint: kind}.

    recorded: {fingerprint: seconds} of those like which others were made here before.
    """

    def __init__(self, rows: list[str], stages: dict[str, str], recorded: dict[str, float] | None = None):
        self.rows, self.at, self.stages, self.recorded = rows, 0, stages, recorded or {}
        self.seen: dict[str, list[float]] = {}
        self.against: list[tuple[str, float, float]] = []  # kind, recorded and true seconds of stages that had both
        self.at_work, self.kind, self.since, self.worked = "", None, 0.0, False

    def text(self, bars: list[Bar]) -> str:
        where = f"row {self.at + 1} of {len(self.rows)}: " if len(self.rows) > 1 else ""
        job = os.environ.get(JOB)
        left = self.left(bars)
        about = "" if left is None else f", about {duration(left)} left"
        return f"{job + ', ' if job else ''}{where}{self.rows[self.at]}{about}"

    def left(self, bars: list[Bar]) -> float | None:
        """Seconds left, by records at this command's pace, or else by what stages of a kind took in this command.

        None as long as nothing tells of a kind of stage that takes long.
        """
        expected = {kind: sum(took) / len(took) for kind, took in self.seen.items()}
        now = None if self.kind is None else self._expected_now(bars)
        if now is not None:
            expected[self.kind] = now
        known = {name: seconds * self._pace(self.stages[name], now) for name, seconds in self._recorded().items()}
        untold = {kind for name, kind in self.stages.items() if name not in known} - expected.keys() - SHORT.keys()
        if untold or not (expected or known):
            return None
        scaled = {self.stages[name]: seconds for name, seconds in known.items()} | expected
        usual = sum(seconds / SHORT.get(kind, 1) for kind, seconds in scaled.items()) / len(scaled)
        for name, kind in self.stages.items():
            if name not in known:
                known[name] = expected[kind] if kind in expected else usual * SHORT[kind]
        if now is not None:
            known[self.at_work] = now
        done = 0 if self.kind is None else min(time.monotonic() - self.since, known[self.at_work])
        return max(0.0, sum(known.values()) - done)

    def _recorded(self) -> dict[str, float]:
        return {name: self.recorded[name] for name in self.stages if name in self.recorded}

    def _pace(self, kind: str, now: float | None) -> float:
        """True by recorded seconds in this command: of stages of this kind or, before one was seen, of all."""
        pairs = list(self.against)
        if now is not None and self.at_work in self.recorded:
            pairs.append((self.kind, self.recorded[self.at_work], now))
        pairs = [pair for pair in pairs if pair[0] == kind] or pairs
        return sum(took for *_, took in pairs) / sum(before for _, before, _ in pairs) if pairs else 1.0

    def begin(self, kind: str, fingerprint: str) -> None:
        self.at_work, self.kind, self.since, self.worked = fingerprint, kind, time.monotonic(), False

    def end(self) -> None:
        """Note what the stage at work took, if there was anything to make."""
        took = time.monotonic() - self.since
        if self.worked:
            self.seen.setdefault(self.kind, []).append(took)
            if self.at_work in self.recorded:
                self.against.append((self.kind, self.recorded[self.at_work], took))
        self.kind = None
        self.stages.pop(self.at_work, None)

    def _expected_now(self, bars: list[Bar]) -> float | None:
        """Seconds that the stage at work takes by its outermost bar."""
        bar = bars[0] if bars else None
        if bar is None or bar.left() is None or bar.part() < EARLY:
            return None
        return time.monotonic() - self.since + bar.left()


class Screen:
    """The two lines at the bottom of the terminal, redrawn in place; other text goes above them."""

    def __init__(self):
        self.bars: list[Bar] = []
        self.whole: Whole | None = None
        self._lines, self._drawn = 0, 0.0

    def width(self) -> int | None:
        """Columns of the terminal that looks on; None for a file, a pipe, or one that cannot move its cursor."""
        if os.environ.get("RANK", "0") != "0":
            return None
        if (passed_on := os.environ.get(WIDTH, "")).isdecimal():
            return int(passed_on)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
                return os.get_terminal_size(sys.stderr.fileno()).columns
        return None

    def draw(self, *, now: bool = False) -> None:
        """Draw the lines, unless they were drawn just now; on no terminal, say from time to time where the bar is."""
        width = self.width()
        if width is None:
            self._say_plainly()
            return
        if not now and time.monotonic() - self._drawn < EVERY:
            return
        width = max(20, width - 1)
        lines = [self.whole.text(self.bars)[:width]] if self.whole else []
        lines += [self.bars[-1].text(width)] if self.bars else []
        self._put("\n".join(f"{line}\x1b[K" for line in lines))
        self._lines, self._drawn = len(lines), time.monotonic()

    def _say_plainly(self) -> None:
        bar = self.bars[-1] if self.bars else None
        if bar is None or bar.left() is None or bar.part() >= 1 or time.monotonic() - bar._said < PLAIN_EVERY:
            return
        bar._said = time.monotonic()
        self.say(f"{bar.what}: {100 * bar.done / bar.total:.0f} %, {duration(bar.left())} left")

    def _put(self, text: str) -> None:
        """Write over the lines that are there."""
        up = f"\x1b[{self._lines - 1}A" if self._lines > 1 else ""
        _to_stderr(f"\r{up}{text}\x1b[J")

    def erase(self) -> None:
        if self._lines:
            self._put("")
            self._lines = 0

    def say(self, text: str) -> None:
        """A line of the screen's own, for a file; of several processes one speaks."""
        if self.width() is None and os.environ.get("RANK", "0") == "0":
            self.write(text)

    def write(self, text: str) -> None:
        """A line above the bar."""
        with _lock:
            self.erase()
            _to_stderr(f"{text}\n")
            if self.width() is not None and (self.bars or self.whole):
                self.draw(now=True)


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


_screen = Screen()


def terminal_width() -> int | None:
    """Columns of the terminal that looks on; None for a file or a pipe."""
    return _screen.width()


class LogHandler(logging.Handler):
    """A handler that writes log lines above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(ValueError):  # a stream that is closed
            _screen.write(self.format(record))


@contextlib.contextmanager
def bar(what: str, total: float | None, **options) -> Iterator[Bar]:
    """Show a bar inside; total: the amount of its work, in whatever measures its time. options: as `Bar` takes them.

    apart=False: the time inside is also the outer bar's.
    """
    made = Bar(what, total, **options)
    with _lock:
        _screen.bars.append(made)
        if _screen.whole:
            _screen.whole.worked = True
        _screen.draw(now=True)
    try:
        yield made
        if total is not None:
            _screen.say(f"{what}: {counted_in(made.items, made.unit)} in {duration(made.seconds())}")
        if made.foreseen is not None:
            log.debug("%s: %.1f s; after a tenth %.1f were foreseen", what, made.seconds(), made.foreseen)
    finally:
        with _lock:
            _screen.bars.remove(made)
            if _screen.bars and made.apart:
                _screen.bars[-1].pause(time.monotonic() - made._began)
            _screen.draw(now=True)


def step(what: str) -> contextlib.AbstractContextManager[Bar]:
    """Show inside what is being done, where nobody knows for how long."""
    return bar(what, None)


def over(items: Iterable, what: str, *, unit: str, total: int | None = None, before: int = 0, **options) -> Iterator:
    """The items, with a bar that counts them, all alike. total: how many, of what has no length; before: how many were
    there already.
    """
    with bar(what, (len(items) if total is None else total) + before, unit=unit, **options) as shown:
        shown.skip(before, items=before)
        for item in items:
            yield item
            shown.add()


@contextlib.contextmanager
def whole(
    rows: list[str], stages: dict[str, str], recorded: dict[str, float] | None = None
) -> Iterator[Callable[[int], None]]:
    """Show inside a line on the whole; the function that it gives begins a row.

    rows: their names for people. stages: those to make, each once, {fingerprint: kind}. recorded: as `Whole`.
    """
    made = Whole(rows, stages, recorded)

    def begin(row: int) -> None:
        with _lock:
            made.at = row
            if len(rows) > 1:
                _screen.say(f"— row {row + 1} of {len(rows)}: {rows[row]}")
            _screen.draw(now=True)

    with _lock:
        _screen.whole = made
    try:
        yield begin
    finally:
        with _lock:
            _screen.whole = None
            _screen.erase()


@contextlib.contextmanager
def making(kind: str, fingerprint: str) -> Iterator[None]:
    """Time what is done inside as a stage of this kind; where no bar was shown, nothing was to be made."""
    known = _screen.whole
    if known is None or fingerprint not in known.stages:
        yield
        return
    known.begin(kind, fingerprint)
    try:
        yield
    finally:
        known.end()
