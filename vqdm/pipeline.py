"""Runs of experiments and tables, stage by stage. Finished stages are skipped: the same command again is a resume."""

import dataclasses
import functools
import hashlib
import logging
import time
from dataclasses import asdict
from pathlib import Path

from vqdm.config.options import Config
from vqdm.errors import NotRunHere, UserError
from vqdm.report.experiments import Table
from vqdm.runs import processes, progress, sweeps
from vqdm.runs.files import canonical_json, is_writable
from vqdm.runs.store import Store
from vqdm.runs.texts import duration
from vqdm.stages.graph.acceleration import is_on
from vqdm.stages.graph.denoiser import Quantization
from vqdm.stages.graph.experiment import Graph, build_stages
from vqdm.stages.graph.samplers import samplers
from vqdm.stages.graph.tiny_train import tiny_train_stage
from vqdm.stages.plan.command import print_plan, say_before_work, warn_of_emulated_bfloat16

log = logging.getLogger("vqdm")


def run(config: Config) -> dict | None:
    """Run one experiment; returns its run record (None for plan=true)."""
    store = Store(Path(config.results_dir))
    if config.task == "tiny_train":
        return _tiny_train(config, store)
    if config.plan:
        print_plan(config, store)
        return None
    stages = _ready(config, store)
    with _shown_as([config], [stages], store) as begin:
        begin(0)
        record = _run(config, store, stages)
    if processes.is_main() and config.task == "experiment" and not sweeps.is_job():
        from vqdm.report.terminal import run_summary

        print(run_summary(record, store.root))
    return record


def _shown_as(configs: list[Config], graphs: list[Graph | Quantization], store: Store):
    """The screen's line on all these runs, with the stages of each kind that they still need; rows share them."""
    from vqdm.runs.device import resolve_device
    from vqdm.stages.plan.expected import missing_stages

    device = resolve_device(configs[0].device, threads=configs[0].threads)
    log.info("%s", device)
    warn_of_emulated_bfloat16(configs, device.name)
    missing, recorded = missing_stages(zip(configs, graphs, strict=True), store, device=device.name)
    return progress.whole([config.method or config.name for config in configs], missing, recorded)


def run_table(table: Table, rows: list[list[Config]], *, row: str | None = None, mixed: bool = False) -> None:
    """Run every row of a table, or one row, and write the table anew after each run; rows share stages.

    rows: the configurations of each row's runs. row: name of the one row to run; the other rows are shown if the same
    configurations were run before, so that each row can be a job of its own; theirs may be []. mixed: runs of different
    protocols may share a column.
    """
    from vqdm.report.formats import table_content, write_table
    from vqdm.report.share import write_share

    chosen = [i for i, own in enumerate(table.rows) if row is None or own is table.row(row)]
    first = rows[chosen[0]][0]
    if first.plan:
        _plan_rows([config for i in chosen for config in rows[i]])
        return
    store = Store(Path(first.results_dir))  # one command, so one folder
    rows = [[_grouped(config, table.name) for config in configs] for configs in rows]
    graphs = {(i, config.name): _ready(config, store) for i in chosen for config in rows[i]}  # before any work
    work, files = [(i, config) for i in chosen for config in rows[i]], []
    own: dict[int, list[dict]] = {i: [] for i in chosen}
    with _shown_as([config for _, config in work], list(graphs.values()), store) as begin:
        for number, (i, config) in enumerate(work):
            begin(number)
            own[i] += _run_unless_refused(config, store, graphs[i, config.name])
            # other rows are looked for now, since they may have ended meanwhile in processes of their own
            made = [own[k] if k in own else _finished(configs, store) for k, configs in enumerate(rows)]
            content = table_content(table, made, model=config.model.name, results=store.root, mixed=mixed)
            if is_writable(store.root):
                _, files = write_table(content, made, results=store.root)
                files.append(write_share(table, content, made, model=config.model.name, results=store.root))
    if processes.is_main():
        _end_table(content, made, files, config=config, store=store, command=table.command(config.model.name))


def _end_table(content, made: list[list[dict]], files: list[Path], *, config: Config, store: Store, command: str):
    """Print the table, make its figures and page, and say where all of it is.

    files: the table's own, the Markdown first; none where nothing can be written.
    """
    from vqdm.report.formats import markdown_of
    from vqdm.report.report import write_report
    from vqdm.report.terminal import closing, table_summary

    if not files:
        print(markdown_of(content), f"{store.root} cannot be written, so the table is only shown", sep="\n")
        return
    print(markdown_of(content) if config.verbose else table_summary(content, file=files[0]))  # before what decorates it
    with progress.step("figures and page"):
        files += write_report(content, made, commands=[command], results=store.root)
        _track_table(content.name, config, files, store, made)
    log.debug("wrote %s", ", ".join(map(str, files)))
    print(closing(made, store.root, table=files[0], page=files[-1]))


def end_sweep(directory: Path, results: Path) -> None:
    """Print a table of the sweep's jobs that were scored; it is written with its figures and page."""
    from vqdm.report.any_runs import report_sweep

    try:
        said = report_sweep(directory, results)
    except UserError as error:  # it only decorates: the jobs are done
        said = f"no table of the sweep: {error}"
    if said is not None:
        print(f"\n{said}")


def _grouped(config: Config, group: str) -> Config:
    return dataclasses.replace(config, tracker=dataclasses.replace(config.tracker, group=group))


def _run_unless_refused(config: Config, store: Store, graph: Graph) -> list[dict]:
    """The record of a run; none if another library refuses it."""
    try:
        return [_run(config, store, graph)]
    except NotRunHere as reason:
        log.warning("not run: %s", reason)
        return []


def _plan_rows(configs: list[Config]) -> None:
    plans = []
    for config in configs:
        print(f"— {config.name}, {config.method or ''}")
        plans.append((config, print_plan(config, Store(Path(config.results_dir)), every_layer=False)))
    from vqdm.stages.plan.rows import total_line

    print(total_line(plans))


def _track_table(name: str, config: Config, files: list[Path], store: Store, made: list[list[dict]]) -> None:
    """Track the table as a run of its own beside its rows', with its figures; the same one for the same runs."""
    from vqdm.runs.tracker import start_tracker

    found = [record["fingerprint"] for records in made for record in records]
    tracker = start_tracker(
        **asdict(config.tracker),
        name=name,
        run_id=hashlib.sha256(canonical_json([name, found])).hexdigest()[:16],
        settings={"table": name, "model": config.model.name},
        directory=store.root / "tracker",
    )
    tracker.figures([file.with_suffix(".png") for file in files if file.parent.name == "figures"])
    tracker.table_files(name, [file for file in files if file.parent.name in ("tables", "share")])
    tracker.finish(failed=False)


def _finished(configs: list[Config], store: Store) -> list[dict]:
    """The existing records of a row's runs in exactly these configurations."""
    from vqdm.report.records import is_finished, read_record

    try:
        last = [build_stages(config, cache=store.hashes).stages()[-1] for config in configs]
    except UserError:  # this row's needs are not here, so it was not run here either
        return []
    found = [read_record(store, config.name, stage) for config, stage in zip(configs, last, strict=True)]
    return [record for record in found if record is not None and is_finished(record, store.root)]


def _ready(config: Config, store: Store) -> Graph | Quantization:
    """Build the run's stages and check that all it needs is there.

    UserError names all that is missing, before any work.
    """
    from vqdm.models.location import configs_directory, download
    from vqdm.models.samplers import check_sampler

    if config.finetune.steps:
        processes.check_batch_size(config.finetune.batch_size)
    problems, stages = [], None
    try:
        stages = build_stages(config, cache=store.hashes)
    except UserError as error:
        problems.append(str(error))
    if config.model.hub_id is not None:
        try:
            download(config.model, allow_network=not problems)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(" — and: ".join(problems))
    fetched = _fetch_weights(config)
    if config.model.hub_id is not None or fetched:
        stages = build_stages(config, cache=store.hashes)  # again, now that the files tell which layers the model has
    for sampler in samplers(config):
        check_sampler(configs_directory(config.model), sampler)
    if config.finetune.steps:
        _check_finetune(config, configs_directory(config.model))
    if is_on(config):
        from vqdm.stages.accelerate import check_acceleration

        check_acceleration(config)
    quantize = next((stage for stage in stages.stages() if stage.name == "quantize"), None)
    if quantize is not None and store.status(quantize) != "done":
        _check_layers(config)
    say_before_work(config, store, stages)
    return stages


def _fetch_weights(config: Config) -> bool:
    """Download missing weights of metrics; True if there were any. Metrics without weights are not run."""
    from vqdm.metrics.families import FAMILIES
    from vqdm.metrics.sources import fetch, find

    if config.task != "experiment":
        return False
    folder = Path(config.evaluate.weights)
    needed = {weights for family in config.evaluate.metrics for weights in FAMILIES[family].weights}
    absent = [weights for weights in needed if find(weights, folder) is None]
    return any([fetch(weights, folder) is not None for weights in absent])


def _check_finetune(config: Config, directory: Path) -> None:
    """Raise UserError for options of distillation that the model rules out."""
    from vqdm.distillation.losses import block_outputs
    from vqdm.models.loader import denoiser_on_meta
    from vqdm.models.samplers import is_flow_matching

    own = config.finetune
    scheduled = {"weighting=min_snr": own.weighting, "trajectories.along=data": own.trajectories.along}
    for option, found in scheduled.items():
        if option.endswith(f"={found}") and is_flow_matching(directory):
            raise UserError(
                f"finetune.{option} needs a noise schedule, and {directory} is a flow-matching model: leave it out"
            )
    if own.feature_weight:
        with block_outputs(denoiser_on_meta(config.model)):
            pass


def _check_layers(config: Config) -> None:
    """Check from the shapes that the scheme fits every layer, and log the bits to come."""
    from vqdm.codecs.allocation import planned_bits
    from vqdm.models.loader import denoiser_on_meta

    bits = planned_bits(
        denoiser_on_meta(config.model), config.quantize, pattern=config.model.layers, min_size=config.model.min_size
    )
    log.debug("%s: will take %.3f bits per weight, %.2f MiB", config.name, bits.bits_per_weight, bits.bytes / 2**20)


def _run(config: Config, store: Store, stages: Graph | Quantization) -> dict:
    """Run all stages under one tracker run; returns the run's record."""
    from vqdm.runs.device import resolve_device
    from vqdm.runs.tracker import start_tracker
    from vqdm.stages.accelerate import check_products

    began = time.monotonic()
    device = resolve_device(config.device, threads=config.threads)
    check_products(config, device.name)
    record, last = _record(config, store, stages), stages.stages()[-1]
    processes.check_agreement(last.fingerprint)
    if not is_writable(store.root):
        return _shown(config, store, last)
    store.record_run(config.name, record)  # before any work: a concurrent prune spares what a run refers to
    tracker = start_tracker(
        **asdict(config.tracker),
        name=last.directory_name,
        run_id=last.fingerprint[:16],
        settings=asdict(config),
        directory=store.root / "tracker",
    )
    failed = True
    try:
        record |= _work(config, store, stages, device=device, tracker=tracker) | {"tracker": tracker.id}
        store.record_run(config.name, record)
        failed = False
    except NotRunHere as reason:
        store.record_run(config.name, record | {"not_run": str(reason)})
        raise
    finally:
        try:
            _log_stages(tracker, store, stages)  # if the run fails, those that are done by then
        finally:
            tracker.finish(failed=failed)
    called = config.name if config.method is None else f"{config.method} ({config.name})"
    log.info("%s: finished in %s%s", called, duration(time.monotonic() - began), _said_of(record, store.root))
    return record


def _said_of(record: dict, results: Path) -> str:
    """The scores in a line, for a run that has any."""
    from vqdm.report.records import is_finished
    from vqdm.report.terminal import row_line

    return f": {row_line(record, results)}" if is_finished(record, results) else ""


def _shown(config: Config, store: Store, last) -> dict:
    """The record of a finished run whose place is read-only now; UserError if there is anything to do."""
    from vqdm.report.records import is_finished, read_record

    record = read_record(store, config.name, last)
    if record is None or not is_finished(record, store.root):
        raise UserError(f"cannot write in {store.root}, and {config.name} is not finished there; give results_dir=…")
    log.info("%s: finished before; %s cannot be written, so nothing is", config.name, store.root)
    return record


def _work(config: Config, store: Store, stages: Graph | Quantization, *, device, tracker) -> dict:
    if isinstance(stages, Quantization):
        from vqdm.stages.compress import compress_model

        return compress_model(config, store, stages, device=device, tracker=tracker)
    from vqdm.stages.experiment import run_experiment

    return run_experiment(config, store, stages, device=device, tracker=tracker)


def _log_stages(tracker, store: Store, stages: Graph | Quantization) -> None:
    """Log each stage's manifest in a section of its name, and references to the denoisers with what made them."""
    for name, stage in stages.named().items():
        if store.status(stage) != "done":  # images can always be extended
            continue
        summary = store.summary(stage) or {}
        tracker.log({f"{name}/{key}": value for key, value in summary.items()})
        directory = store.directory(stage)
        if (directory / "denoiser").is_dir():
            upstream = {key: getattr(up, "directory_name", up) for key, up in stage.upstream.items()}
            made_from = {"stage": stage.name, "fingerprint": stage.fingerprint, "upstream": upstream}
            inputs = [
                up
                for up in stage.upstream.values()
                if not isinstance(up, str) and (store.directory(up) / "denoiser").is_dir()
            ]
            named = tuple(f"{up.name}-{up.directory_name}" for up in inputs)
            metadata = made_from | stage.config | summary
            tracker.denoiser(f"{stage.name}-{stage.directory_name}", directory, metadata, named)


def _record(config: Config, store: Store, stages: Graph | Quantization) -> dict:
    own = {name: stage for name, stage in stages.named().items() if not name.startswith("teacher_")}
    directories = {n if "/" in n else stage.name: store.directory(stage) for n, stage in own.items()}
    return {
        "fingerprint": stages.stages()[-1].fingerprint,
        "experiment": config.name,
        "method": config.method or config.name,
        "model": config.model.name,
        "stages": [str(store.directory(stage).relative_to(store.root)) for stage in stages.stages()],
        "directories": {name: str(path.relative_to(store.root)) for name, path in directories.items()},
    }


def _tiny_train(config: Config, store: Store) -> dict | None:
    """Train the tiny world into its own stage; `scripts/publish_tiny.py` makes it the shipped one."""
    stage = tiny_train_stage(config.tiny_train, cache=store.hashes)
    if config.plan:
        print(f"tiny_train {store.status(stage)} {store.directory(stage)}")
        return None
    from vqdm.runs.device import computes_in_bfloat16, resolve_device
    from vqdm.stages.tiny_train.train import train_tiny

    device = resolve_device("cpu", threads=config.threads)
    environment = {"device": "cpu", "reason": "the tiny world trains on the CPU", "threads": device.threads}
    environment["precision"] = "bfloat16" if computes_in_bfloat16("cpu") else "float32"
    directory = store.ensure(stage, functools.partial(train_tiny, config.tiny_train), environment=environment)
    record = {
        "fingerprint": stage.fingerprint,
        "experiment": config.name,
        "stages": [str(directory.relative_to(store.root))],
    }
    store.record_run(config.name, record)
    print(f"trained: {directory}; publish with `python scripts/publish_tiny.py {directory}`")
    return record
