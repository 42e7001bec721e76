"""The command `vqdm` of an installed package, and `python run.py` of a checkout: both do the same.

Compose a configuration with Hydra, turn it into dataclasses, hand it to vqdm.pipeline.
"""

import contextlib
import logging
import os
import re
import signal
import sys
from pathlib import Path

try:
    import hydra
except ModuleNotFoundError:
    sys.exit("error: this command needs more than the library: pip install 'vqdm[experiments,metrics,report]'")
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vqdm.config.compose import NamedSweep, one_line, overrides_for_rows, register_schemas, run_as_job, to_config
from vqdm.config.places import CONF, EXPERIMENTS, SCRIPT
from vqdm.errors import UserError
from vqdm.runs import processes, progress, sweeps
from vqdm.runs.entry import STOPPED, leave_at_once, prepare, reader_is_gone

OF_NAMED_ROW: list[str] = []  # overrides that are put before the user's
LADDER = re.compile(r"^(\+*evaluate\.ladder=)(\d+(?:,\d+)*)$")  # a list, never a sweep, which would make equal runs
CLUSTER_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # USR2 is submitit's before a job's time is up


def _table(name: str):
    from vqdm.report.experiments import read_table

    return read_table(EXPERIMENTS / f"{name}.yaml")


def _of_named_row(arguments: list[str]) -> list[str]:
    """Overrides of the row that a command names, so that Hydra lets it set options of the row's own codec."""
    given = dict(argument.lstrip("+").partition("=")[::2] for argument in arguments)
    if not {"table", "row"} <= set(given) or {"experiment", "-m", "--multirun"} & set(given):
        return []
    with contextlib.suppress(UserError):  # which is said when all is composed
        return _table(given["table"]).row(given["row"]).overrides_of_runs()[0]
    return []


def _rows(table, task_overrides: list[str], config):
    """The configurations of every row, one per calibration seed: the user's own overrides on top.

    With config.row, another row to which these overrides do not apply gets []: it was not run so.
    """
    own = overrides_for_rows(task_overrides[len(OF_NAMED_ROW) :])
    wanted = None if config.row is None else table.row(config.row)
    rows, left_out = [], []
    for row in table.rows:
        runs = row.overrides_of_runs()[: config.seeds]
        try:
            rows.append([to_config(hydra.compose("config", [*overrides, *own])) for overrides in runs])
        except (UserError, HydraException, OmegaConfBaseException):
            if wanted in (None, row):
                raise
            rows.append([])
            left_out.append(row.name)
    if left_out:
        logging.getLogger("vqdm").info("rows to which these overrides do not apply: %s", ", ".join(left_out))
    return rows


def _run(composed: DictConfig) -> None:
    from vqdm import pipeline

    config = to_config(composed)
    if config.table is None:
        sweeps.say_run(pipeline.run(config))
        return
    table = _table(config.table)
    rows = _rows(table, list(HydraConfig.get().overrides.task), config)
    pipeline.run_table(table, rows, row=config.row, mixed=config.mixed)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _composed(composed: DictConfig) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[progress.LogHandler()])
    spoken = logging.DEBUG if composed.verbose else logging.INFO
    logging.getLogger("vqdm").setLevel(spoken if processes.is_main() else logging.WARNING)
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweeping and not processes.launched():  # those of torchrun stay together
        run_as_job([str(SCRIPT)] if SCRIPT.is_file() else ["-m", "vqdm"])
        return
    try:
        _run(composed)
    except UserError as error:
        if sweeping:
            raise  # the other jobs go on
        sys.exit(f"error: {one_line(error)}")  # past Hydra, which would add lines of its own
    except BrokenPipeError:  # of `… plan=true | head`, or the tracker's
        if not reader_is_gone():
            raise


class Stopped(KeyboardInterrupt):
    """A signal came; its number is the argument."""


def _stop(number: int, _) -> None:
    """Let the tracker finish; only a second Ctrl-C can keep it from that."""
    for other in CLUSTER_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raise Stopped(number)


def _say_launcher_failed(error: Exception) -> None:
    """Jobs fail in processes of their own; what comes up to here is the launcher's: a worker killed, no cluster."""
    print(*sweeps.failures(NamedSweep.directory), sep="\n", file=sys.stderr)
    sys.exit(f"error: the sweep's launcher stopped: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _looked_up(arguments: list[str]) -> str | None:
    """What was asked for that runs nothing: help, a list, or what the tab key completes; None: run."""
    from vqdm.config import help

    if {"-h", "--help"} & set(arguments):
        return help.help_text(next((argument for argument in arguments if not argument.startswith("-")), None))
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if given.get("list") == "runs":
        from vqdm.report.any_runs import list_runs

        return list_runs(Path(given.get("results_dir", "results")))
    if "list" in given:
        return help.list_of(given["list"])
    if "query" in given and (offered := help.completions(os.environ.get("COMP_LINE", ""))) is not None:
        return " ".join(offered)
    return None


def _report_sweep(directory: Path, results: Path) -> None:
    from vqdm.pipeline import end_sweep

    end_sweep(directory, results)


def main() -> None:
    """Run the command that sys.argv holds, in a process that has not imported torch so far."""
    if os.environ.get("RANK", "0") != "0":  # of several processes one speaks
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    prepare()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing several lines: one line is ours
    register_schemas()
    for number in (signal.SIGINT, *CLUSTER_SIGNALS):
        signal.signal(number, _stop)
    NamedSweep.report = staticmethod(_report_sweep)
    try:
        sys.argv[1:] = [LADDER.sub(r"\1[\2]", argument) for argument in sys.argv[1:]]
        sys.argv[1:] = ["verbose=true" if argument in ("-v", "--verbose") else argument for argument in sys.argv[1:]]
        if (answer := _looked_up(sys.argv[1:])) is not None:
            print(answer)
            return
        OF_NAMED_ROW[:] = _of_named_row(sys.argv[1:])
        first = next((i for i, argument in enumerate(sys.argv) if re.match(r"[^-]\S*=", argument)), 1)
        sys.argv[first:first] = OF_NAMED_ROW
        _composed()
        processes.leave()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt as stopped:
        print(STOPPED, file=sys.stderr)
        leave_at_once(stopped.args[0] if stopped.args else signal.SIGINT)
    except Exception as error:
        if NamedSweep.directory is None or processes.launched():
            raise
        _say_launcher_failed(error)


if __name__ == "__main__":
    main()
