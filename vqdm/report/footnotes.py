"""Footnotes of a table: the meaning of its marks, the source of published values, and each number's protocol."""

import json
from collections.abc import Iterable
from pathlib import Path

from vqdm.report.experiments import Table
from vqdm.report.records import protocols_of, scores_of
from vqdm.runs.store import Store


def sentences(table: Table, data, *, of_runs: int, model: str) -> list[str]:
    """Sentences about the table as a whole. of_runs: how many rows were run."""
    found = []
    if of_runs < len(data):
        found.append(f"{of_runs} of {len(data)} rows were run; `{table.command(model)}` goes on with the others.")
    found.append("± is one standard error over prompts, unless said otherwise below.")
    if (data["calibration_seeds"] > 1).any():
        found.append("In brackets, where a row is the mean of several calibration seeds, their standard deviation.")
    return found + about_published(table) + about_making(table, model)


def about_published(table: Table) -> list[str]:
    if table.source is None:
        return []
    found = [f"Published values: {table.source}."]
    if table.tolerances:
        within = ", ".join(f"{metric} {tolerance:g}" for metric, tolerance in table.tolerances.items())
        found.append(f"Δ is ours minus published; ✓: reproduced, within the tolerance ({within}); ✗: not.")
    if table.published_protocol:
        expected = ", ".join(f"{key} {value}" for key, value in table.published_protocol.items())
        found.append(f"No mark stands where ours was not scored as published ({expected}).")
    return found


def about_making(table: Table, model: str) -> list[str]:
    hours = [f"GPU-hours: {table.gpu_hours}."] if table.gpu_hours else []
    return [*hours, f"To make it: `{table.command(model)}`."]


def notes(table: Table, runs: list[dict], results: Path, *, model: str) -> list[str]:
    """Notes.

    Deviations, shared parts of the protocol, then for each metric its own, warnings, and why it was not run.
    """
    first = [*(f"deviation: {deviation}" for deviation in table.deviations), f"model: {model}"]
    if not runs:
        return first
    named = [(run["method"], *protocols_of(run, results, table.metrics)) for run in runs]
    common = _grouped(_merged([(method, shared) for method, shared, _ in named]))
    common |= _merged([(run["method"], made_on) for run in runs if (made_on := _made_on(run, results))])
    lines = [*first, *(f"{key}: {value}" for key, value in common.items())]
    own = {}
    for metric in table.metrics:
        protocols = [(method, parts[metric]) for method, _, parts in named if metric in parts]
        own |= {metric: _grouped(_merged(protocols))} if protocols else {}
    lines += _shared_once(own)
    made_by = [(run["method"], run["bits"]["made_by"]) for run in runs if "made_by" in run["bits"]]
    lines += [f"{method}: quantized as {name}" for method, name in made_by]
    return lines + _remarks(table, runs, results)


def refusals(table: Table, rows: list[list[dict]], results: Path) -> list[str]:
    """A line for every row that another library refused when it was last tried, with the reason it gave."""
    said = {record["experiment"]: record["not_run"] for _, record in Store(results).runs() if record.get("not_run")}
    missing = [row for row, runs in zip(table.rows, rows, strict=True) if not runs and row.name in said]
    return [f"{row.method or row.name}: not run: {said[row.name]}" for row in missing]


def _made_on(run: dict, results: Path) -> dict[str, str]:
    """The processor on which a run's weights, or else its images, were made; empty where that is not known.

    It is no part of the protocol: its kernels add in an order of their own, and codes follow (docs/lab-notes.md).
    """
    stage = next((name for name in ("quantize", "generate") if name in run["directories"]), "evaluate")
    file = results / run["directories"][stage] / "manifest.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("processor") if file.is_file() else None
    return {} if found is None else {"processor": found}


def _shared_once(own: dict[str, dict[str, str]]) -> list[str]:
    """{metric: {key: value}} as lines, in which what several metrics share comes once, before what is their own."""
    sharing: dict[tuple[str, str], list[str]] = {}
    for metric, protocol in own.items():
        for item in protocol.items():
            sharing.setdefault(item, []).append(metric)
    groups: dict[tuple[str, ...], list[str]] = {}
    for (key, value), metrics in sharing.items():
        groups.setdefault(tuple(metrics), []).append(value if key == "is" else f"{key}: {value}")
    first = sorted(groups, key=len, reverse=True)  # stable: groups of one stay in the order of the columns
    return [f"{_names(metrics, of=len(own))}: {'; '.join(groups[metrics])}" for metrics in first]


def _names(metrics: tuple[str, ...], *, of: int) -> str:
    return "every metric" if len(metrics) == of > 1 else ", ".join(metrics)


def _remarks(table: Table, runs: list[dict], results: Path) -> list[str]:
    lines = []
    scored = [(run["method"], scores_of(run, results)) for run in runs]
    for metric in table.metrics:
        made = [(method, scores["metrics"][metric]) for method, scores in scored if metric in scores["metrics"]]
        said = [(method, score["note"]) for method, score in made if score.get("note")]
        lines += [f"{metric}: {text}" for text in _with_methods(said, of=len(dict(made)))]
        biases = [score["bias"] for _, score in made if score.get("bias") is not None]
        if biases:
            ends = sorted({f"{min(biases):.3g}", f"{max(biases):.3g}"}, key=float)
            lines.append(f"{metric}: bootstrap bias {' to '.join(ends)}")
        missing = [(method, scores["not_run"][metric]) for method, scores in scored if metric in scores["not_run"]]
        lines += [f"{metric}: not run: {text}" for text in _with_methods(missing, of=len(dict(scored)))]
    return lines


def _with_methods(said: list[tuple[str, str]], *, of: int) -> list[str]:
    """List every text once, with the methods it applies to unless these are all."""
    methods = _by_value(said)
    return [text if len(of_it) == of else f"{text} ({'; '.join(of_it)})" for text, of_it in methods.items()]


def _merged(protocols: list[tuple[str, dict]]) -> dict[str, str]:
    """{key: value} as text; if methods differ, each value comes with its methods."""
    found = {}
    for key in dict.fromkeys(key for _, protocol in protocols for key in protocol):
        values = _by_value((method, _text(protocol.get(key, "not stated"))) for method, protocol in protocols)
        found[key] = next(iter(values)) if len(values) == 1 else _told_apart(values)
    return found


def _told_apart(values: dict[str, list[str]]) -> str:
    """Each value with its methods; the commonest comes last, of "all others", where naming them would be long."""
    common = max(values, key=lambda value: len(values[value]))
    last = [f"{common} (all others)"] if len(values[common]) > 2 else []
    named = (f"{value} ({'; '.join(of_it)})" for value, of_it in values.items() if not last or value != common)
    return ", ".join([*named, *last])


def _by_value(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for method, value in pairs:
        methods = found.setdefault(value, [])
        methods += [method] * (method not in methods)
    return found


def _grouped(merged: dict[str, str]) -> dict[str, str]:
    """{"sampler.steps": "4", "sampler.guidance": "3"} as {"sampler": "steps 4, guidance 3"}"""
    parts: dict[str, list[str]] = {}
    for key, value in merged.items():
        top, _, rest = key.partition(".")
        parts.setdefault(top, []).append(f"{rest} {value}".strip())
    return {top: ", ".join(values) for top, values in parts.items()}


def _text(value) -> str:
    if isinstance(value, list):
        return ", ".join(_text(part) for part in value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value).replace("null", "none")
