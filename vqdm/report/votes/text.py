"""A study's results as Markdown."""

from tabulate import tabulate

from vqdm.runs.texts import in_markdown, in_one_line


def to_markdown(result: dict) -> str:
    """Results as text: tables of the comparisons, of the strengths if there are any, and of the raters, with notes."""
    study, question = (in_markdown(result[key]) for key in ("study", "question"))
    parts = [f"# Votes of the study {study}", f"“{question}”", _comparisons(result)]
    if result["strengths"]:
        parts += ["## Strengths (Bradley–Terry)", _strengths(result)]
    parts += ["## Raters", _raters(result), _agreement(result)]
    if result["left_out"]:
        lines = (in_one_line(line).replace("`", "") for line in result["left_out"])
        parts += ["## Files left out", "\n".join(f"- `{line}`" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[list], headers: list[str]) -> str:
    rows = [[in_markdown(cell, cell=True) for cell in row] for row in rows]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _share(value: float | None, bounds: list | None) -> str:
    if value is None or bounds is None:
        return "–"
    return f"{value:.1f} [{bounds[0]:.1f}, {bounds[1]:.1f}]"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _names(result: dict) -> dict[str, str]:
    """Name of every system: its method, followed by its run's name where two have the same method."""
    methods = list(result["systems"].values())
    return {run: m if methods.count(m) == 1 else f"{m} ({run})" for run, m in result["systems"].items()}


def _comparison(row: dict, names: dict[str, str]) -> list[str]:
    title = f"{names[row['left']]} over {names[row['right']]}"
    counts = [f"{row['wins']} / {row['ties']} / {row['losses']}", row["raters"], row["prompts"]]
    if row["preference_percent"] is None:
        return [title, "no votes", "–", "–", *counts, "–", "–", "–", "–"]
    return [
        title,
        _share(row["preference_percent"], row["interval_over_prompts"]),
        _share(row["preference_percent"], row["wilson"]),
        _share(row["without_ties_percent"], row["wilson_without_ties"]),
        *counts,
        _p(row["p_prompts"]),
        _p(row["p_votes"]),
        _number(row["agreement"]),
        _number(row["without_exclusions_percent"], 1),
    ]


def _comparisons(result: dict) -> str:
    headers = [
        "preferred", "%, ties split [over prompts]", "[Wilson]", "%, without ties [Wilson]", "wins / ties / losses",
        "raters", "prompts", "p, prompts", "p, votes", "α", "% of all raters",
    ]  # fmt: skip
    rows = [_comparison(row, _names(result)) for row in result["comparisons"]]
    level = f"{100 * result['confidence']:g} %"
    return (
        f"{_table(rows, headers)}\n\nIntervals are of {level}. The one over prompts resamples whole prompts and is "
        "the one to quote; Wilson's takes all votes for independent, and so does “p, votes”. “p, prompts” is the "
        "two-sided sign test over prompts, by the mean vote on each. α is Krippendorff's (ordinal). The last column "
        "leaves nobody out."
    )


def _strengths(result: dict) -> str:
    rows = [
        [
            _names(result)[row["system"]],
            _number(row["strength"], 3),
            f"[{_number(row['low'])}, {_number(row['high'])}]",
        ]
        for row in result["strengths"]
    ]
    return (
        f"{_table(rows, ['system', 'log-strength', 'over prompts'])}\n\nMean 0; a is preferred to b with probability "
        "1 / (1 + exp(b − a)), ties as half a win each. “–”: the votes do not bound it."
    )


def _raters(result: dict) -> str:
    rows = [
        [
            row["rater"], row["votes"], _number(row["ties_percent"], 1), _number(row["left_percent"], 1),
            _number(row["median_seconds"]), f"{row['failed_checks']} of {row['checks']}", row["excluded"] or "",
        ]
        for row in result["raters"]
    ]  # fmt: skip
    headers = ["rater", "votes", "ties %", "image A % of the rest", "median s", "failed checks", "excluded"]
    rule = result["exclusion"]
    return (
        f"{_table(rows, headers)}\n\nLeft out, as settled before the first vote: who fails more than "
        f"{100 * rule['max_failed_checks']:g} % of the attention checks, or has a median below "
        f"{rule['min_median_seconds']:g} s per pair."
    )


def _agreement(result: dict) -> str:
    found = result["agreement"]
    return (
        f"Krippendorff's α over all pairs: {_number(found['ordinal'])} (ordinal), {_number(found['nominal'])} "
        "(nominal); 1 is full agreement, 0 what chance gives."
    )
