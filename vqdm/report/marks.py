"""What a page's table shows first, and marks: paired metrics; the best of each column, and the Pareto front."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vqdm.report.figures.pareto import FULL_PRECISION_BITS, label_of
from vqdm.report.numbers import PUBLISHED
from vqdm.report.paired import RANKED_BY, is_paired
from vqdm.report.records import LOWER_IS_BETTER

SIZE = "bits_per_weight"
LAST = ("bits_quantized", "mib")  # sizes that stand behind the metrics


@dataclass(frozen=True)
class Marks:
    """Columns and cells by number. front_by: the metric of the Pareto front, with its label."""

    first: tuple[int, ...]
    folded: tuple[int, ...] = ()
    best: frozenset[tuple[int, int]] = frozenset()
    front: frozenset[int] = frozenset()
    front_by: str | None = None


def metrics_of(data) -> list[str]:
    """The metrics of a table's frame: columns that have a standard error."""
    return [name for name in data.columns if f"{name}_se" in data.columns]


def is_compressed(row: dict) -> bool:
    """True for a row that was run and is not at full precision."""
    bits = row.get(SIZE)
    return bits is not None and bits < FULL_PRECISION_BITS and not row["method"].startswith("full precision")


def is_lower_better(metric: str) -> bool:
    return LOWER_IS_BETTER.fullmatch(metric) is not None


def marks_of(data, columns: Sequence[str]) -> Marks:
    """Marks of a table from its frame of numbers and the names of its text's columns; a table of votes has none."""
    if SIZE not in columns:
        return Marks(tuple(range(len(columns))))
    rows = data.astype(object).where(data.notna(), None).to_dict("records")
    metrics = metrics_of(data)
    first = _first_columns(columns, metrics)
    best = frozenset(
        (row, columns.index(name))
        for name in (*metrics, SIZE, *LAST)
        if name in columns
        for row in _best_rows(rows, name, lower=name not in metrics or is_lower_better(name))
    )
    paired = [name for name in metrics if is_paired(name) and any(row[name] is not None for row in rows)]
    by = next((name for name in (*RANKED_BY, *paired) if name in paired), None)
    front = frozenset() if by is None else front_of(rows, by)
    folded = tuple(column for column in range(len(columns)) if column not in first)
    return Marks(first, folded, best, front, by and label_of(by).rstrip(" ↑↓").removesuffix(", dB"))


def _first_columns(columns: Sequence[str], metrics: list[str]) -> tuple[int, ...]:
    """Method and bits, paired metrics, those with published values, then other sizes; all, if no metric is paired."""

    def metric_of(name: str) -> str | None:
        return next((m for m in metrics if name in (m, f"{m} {PUBLISHED}", f"Δ {m}")), None)

    shown = {m for m in metrics if is_paired(m) or f"{m} {PUBLISHED}" in columns}
    if not shown:
        return tuple(range(len(columns)))
    own = [i for i, name in enumerate(columns) if metric_of(name) is None and name not in LAST]
    scored = [i for i, name in enumerate(columns) if metric_of(name) in shown]
    scored.sort(key=lambda i: not is_paired(metric_of(columns[i])))
    return (*own, *scored, *(i for i, name in enumerate(columns) if name in LAST))


def _best_rows(rows: list[dict], name: str, *, lower: bool) -> list[int]:
    """The compressed rows with the best value of a column; none where there is nothing to compare."""
    sign = 1 if lower else -1
    values = {i: sign * row[name] for i, row in enumerate(rows) if is_compressed(row) and row.get(name) is not None}
    least = min(values.values(), default=math.inf)
    return [i for i, value in values.items() if value == least] if len(values) > 1 else []


def front_of(rows: list[dict], metric: str) -> frozenset[int]:
    """The compressed rows to which no other is better in `metric` without having more bits."""
    sign = 1 if is_lower_better(metric) else -1
    points = {
        i: (row[SIZE], sign * row[metric])
        for i, row in enumerate(rows)
        if is_compressed(row) and row[metric] is not None
    }
    return frozenset(
        i
        for i, (bits, value) in points.items()
        if not any(b <= bits and v <= value and (b, v) != (bits, value) for b, v in points.values())
    )
