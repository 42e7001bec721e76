"""The screen: estimates by what is done, one bar at a time, text above it, and plain lines where nobody looks on."""

import logging
import re

import pytest

from vqdm.runs import progress


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


@pytest.fixture
def said(monkeypatch, capsys):
    """A function that gives what was written so far to stderr, a file."""
    monkeypatch.delenv(progress.WIDTH, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    parts = []

    def so_far() -> str:
        parts.append(capsys.readouterr().err)
        return "".join(parts)

    return so_far


@pytest.fixture
def terminal(said, monkeypatch):
    """A function that gives the rows that a terminal shows."""
    monkeypatch.setenv(progress.WIDTH, "60")

    def rows() -> list[str]:
        return shown(said())

    return rows


def shown(written: str) -> list[str]:
    """The rows of a terminal that knows carriage return, line feed, cursor up, and erasing of the rest."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*[AKJ]|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row == len(rows))
        elif part.startswith("\x1b"):
            if part.endswith("A"):
                row -= int(part[2:-1])
                assert row >= 0
            else:
                rows[row] = rows[row][:column]
            if part.endswith("J"):
                del rows[row + 1 :]
        else:
            rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in rows]


def kinds(**counts: int) -> dict[str, str]:
    """{fingerprint: kind} of so many stages: generate0, generate1, …"""
    return {f"{kind}{number}": kind for kind, count in counts.items() for number in range(count)}


def test_the_time_left_goes_by_weights_and_not_by_layers(clock, said):
    with progress.bar("quantize", 1000, count=3, unit="layer") as bar:
        assert bar.left() is None
        clock.now = 50
        bar.add(500)
        assert bar.left() == 50
        clock.now = 60  # nothing new is done
        assert bar.left() == 40
        clock.now = 90
        bar.add(400)
        assert bar.left() == pytest.approx(10)
        assert bar.foreseen == 100


def test_what_was_there_before_says_nothing_about_the_time(clock, said):
    with progress.bar("quantize", 1000, count=10, unit="layer") as bar:
        bar.skip(800, items=8)
        assert bar.left() is None
        clock.now = 10
        bar.add(100)
        assert bar.left() == 10


def test_an_item_counts_while_it_is_made(clock, said):
    with progress.bar("tune", 2, unit="block") as bar:
        clock.now = 10
        bar.partly(0.5)
        assert bar.left() == 30 and bar.items == 0
        clock.now = 20
        bar.add()
        assert bar.left() == 20 and bar.items == 1


def test_what_is_at_work_side_by_side_counts(clock, said):
    """Two at a time, 10 s each: after the first of ten, 40 s are left, and not 90."""
    with progress.bar("quantize", 10, unit="layer") as bar:
        bar.begin("a"), bar.begin("b")
        clock.now = 10
        bar.add(item="a")
        assert bar.left() == 40
        bar.add(item="b")
        bar.begin("c")
        assert bar.left() == 40
        clock.now = 15  # one alone, as memory allows no second: 1.67 at a time so far
        assert bar.left() == pytest.approx((80 - 5) / (25 / 15))
        with progress.step("compiling kernels, once"):
            clock.now = 115
        assert bar.left() == pytest.approx((80 - 5) / (25 / 15))


def test_what_comes_before_the_first_item_is_no_items_time(clock, said):
    """Nine seconds of looking around, then ten layers of 1 s: after the first, 9 s are left, and not 90."""
    with progress.bar("quantize", 10, unit="layer") as bar:
        clock.now = 9
        bar.begin("a")
        clock.now = 10
        bar.add(item="a")
        assert bar.left() == pytest.approx(9) and bar.foreseen == pytest.approx(19)
        clock.now = 13  # between two groups nothing is at work
        assert bar.left() == pytest.approx(9)
        bar.begin("b")
        clock.now = 14
        bar.add(item="b")
        assert bar.left() == pytest.approx(8)


def test_the_first_items_warm_up_and_leave_the_rate_once_others_are_done(clock, said):
    """The first of ten takes 10 s, the others 1 s each: after the second, 8 s are left, and not 44."""
    with progress.bar("quantize", 10, unit="layer") as bar:
        bar.begin("a")
        clock.now = 10
        bar.add(item="a")
        assert bar.left() == 90
        bar.begin("b")
        clock.now = 11
        bar.add(item="b")
        assert bar.left() == 8


def test_the_time_of_a_bar_inside_is_its_own(clock, said):
    """Compiling at the first layer does not make the others slow."""
    with progress.bar("quantize", 10, unit="layer") as bar:
        with progress.step("compiling kernels, once"):
            clock.now = 100
        clock.now = 101
        bar.add()
        assert bar.left() == 9
        with progress.bar("Hessians", 1, unit="call", apart=False) as inner:
            clock.now = 102
            inner.add()
        bar.add()
        assert bar.left() == 8


def test_without_a_terminal_a_bar_is_a_line_now_and_then(clock, said):
    with progress.bar("generate tiny", 8, unit="batch") as bar:
        for _ in range(8):
            clock.now += 6
            bar.add()
    assert said().splitlines() == ["generate tiny: 50 %, 24 s left", "generate tiny: 8 batches in 48 s"]


def test_of_several_processes_one_speaks(clock, said, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(progress.WIDTH, "100")
    with progress.whole(["a", "b"], kinds(generate=2)) as begin:
        begin(0)
        for _ in progress.over(range(9), "generate", unit="batch"):
            clock.now += 30
    assert said() == ""


def test_a_terminal_shows_one_line_and_one_bar_and_what_is_said_stands_above(clock, terminal):
    log = logging.getLogger("test_progress")
    log.addHandler(progress.LogHandler())
    with progress.whole(["full precision", "RTN 4 bit"], kinds(generate=2)) as begin:
        begin(1)
        with progress.bar("quantize", 4, unit="layer") as bar:
            clock.now = 10
            bar.add()
            first, second = terminal()
            assert first == "row 2 of 2: RTN 4 bit"
            assert second.startswith("quantize  25% |") and second.endswith("| 1 of 4 layers, 30 s left")
            assert len(second) < 60
            log.warning("%d layers stay in 16 bit", 17)
            assert terminal()[0] == "17 layers stay in 16 bit" and len(terminal()) == 3
            with progress.step("loading tiny"):
                assert terminal()[1:] == ["row 2 of 2: RTN 4 bit", "loading tiny …"]
            assert terminal()[2].startswith("quantize")
        assert terminal() == ["17 layers stay in 16 bit", "row 2 of 2: RTN 4 bit"]
    assert terminal() == ["17 layers stay in 16 bit", ""]
    log.handlers.clear()


def test_the_whole_goes_by_what_stages_of_a_kind_took(clock, said):
    with progress.whole(["a", "b", "c"], kinds(generate=3, quantize=2)) as begin:
        found = progress._screen.whole
        begin(0)
        with progress.making("generate", "generate0"):
            assert found.left([]) is None
            with progress.bar("generate", 10, unit="batch") as bar:
                clock.now = 2
                bar.add()  # a generate stage takes 20 s
                assert found.left([bar]) is None, "nothing tells of the others"
                clock.now = 20
        begin(1)
        with progress.making("quantize", "quantize0"), progress.bar("quantize", 2, unit="layer") as bar:
            assert found.left([]) is None
            clock.now = 25
            bar.add()
            assert found.left([bar]) == pytest.approx(2 * 20 + 2 * 10 - 5)
            clock.now = 30
        assert found.left([]) == pytest.approx(2 * 20 + 10)
        with progress.making("generate", "generate1"):
            pass  # was there already
        assert found.left([]) == pytest.approx(20 + 10)
        with progress.making("generate", "generate0"):
            pass  # another row's too: it was counted once
        assert found.left([]) == pytest.approx(20 + 10)


def test_what_was_recorded_is_said_from_the_start_and_follows_this_commands_pace(clock, said):
    stages = kinds(generate=2, quantize=2, features=2)
    with progress.whole(["a", "b"], stages, {"generate0": 30, "generate1": 30, "quantize0": 10}):
        assert progress._screen.whole.left([]) is None, "of one stage nothing is known"
    recorded = {"generate0": 30, "generate1": 30, "quantize0": 10, "quantize1": 100}
    with progress.whole(["a", "b"], stages, recorded):
        found = progress._screen.whole
        assert found.left([]) == pytest.approx(170, rel=0.03)
        with progress.making("quantize", "quantize0"), progress.bar("quantize", 10, unit="layer") as bar:
            clock.now = 1
            bar.add(0.5)
            assert found.left([bar]) == pytest.approx(169, rel=0.03)
            clock.now = 4
            bar.add(1.5)  # twice as slow as then
            assert found.left([bar]) == pytest.approx(2 * 170 - 4, rel=0.03)
            clock.now = 20
        with progress.making("generate", "generate0"), progress.bar("generate", 10, unit="batch") as bar:
            clock.now = 35
            bar.add(5)  # as fast as then
            assert found.left([bar]) == pytest.approx(15 + 30 + 2 * 100, rel=0.03)


def test_stages_of_features_are_known_to_be_short_before_any_was_seen(clock, said):
    with progress.whole(["a"], kinds(generate=2, features=24)) as begin:
        begin(0)
        with progress.making("generate", "generate0"), progress.bar("generate", 10, unit="batch") as bar:
            clock.now = 10
            bar.add()
            assert 180 + 10 < progress._screen.whole.left([bar]) < 180 + 100


def test_a_bar_that_fails_is_gone(said):
    with pytest.raises(ValueError), progress.whole(["a"], {}), progress.bar("x", 2, unit="layer"):
        raise ValueError
    assert progress._screen.bars == [] and progress._screen.whole is None
