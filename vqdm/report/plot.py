"""Numbers of the page's plot of quality against size, which its script draws."""

from collections.abc import Sequence

from vqdm.report.figures.pareto import SIZES, family_of, has_points, label_of
from vqdm.report.formats import DIGITS
from vqdm.report.marks import SIZE, is_compressed, is_lower_better, metrics_of
from vqdm.report.paired import paired_first


def plot_data(data, columns: Sequence[int | None]) -> dict | None:
    """Sizes, metrics and rows for the script; None if no metric has a point.

    data: the table's frame. columns: each row's column in the gallery, None for a row without images.
    """
    if SIZE not in data.columns:
        return None
    metrics = [name for name in paired_first(metrics_of(data)) if has_points(data, name)]
    if not metrics:
        return None
    sizes = [name for name in SIZES if name in data.columns and data[name].notna().any()] or [SIZE]
    rows = data.astype(object).where(data.notna(), None).to_dict("records")
    return {
        "sizes": [SIZES[name] for name in sizes],
        "metrics": [
            {"label": label_of(name), "lower": is_lower_better(name), "digits": DIGITS.get(name, 3)} for name in metrics
        ],
        "rows": [_row(row, column, sizes, metrics) for row, column in zip(rows, columns, strict=True)],
    }


def _row(row: dict, column: int | None, sizes: list[str], metrics: list[str]) -> dict:
    bits = row.get("bits_published")
    return {
        "name": row["method"],
        "family": "".join(family_of(row["method"])),
        "column": column,
        "compressed": is_compressed(row) or (row.get(SIZE) is None and not row["method"].startswith("full precision")),
        "sizes": [row.get(name) for name in sizes],
        "values": [[row[name], row[f"{name}_se"]] for name in metrics],
        "publishedSizes": [None if name == "mib" else bits if bits is not None else row.get(name) for name in sizes],
        "published": [row.get(f"{name}_published") for name in metrics],
    }
