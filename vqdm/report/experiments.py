"""The files of experiments/: one per table, with experiments as rows and metrics or votes as columns."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from vqdm.errors import UserError
from vqdm.runs.texts import nearest

SEEDED = ("calibration.seed", "calibration.noise_seed", "quantize.seed", "finetune.seed")


@dataclass(frozen=True)
class Row:
    """A row: one experiment or, with `seeds` above 1, several that differ only in calibration and distillation."""

    name: str  # name of its run record
    experiment: str  # a file of conf/experiment/
    method: str | None = None  # its name in the table; None: the experiment's own
    overrides: tuple[str, ...] = ()
    seeds: int = 1
    published: dict[str, float] = field(default_factory=dict)  # {metric: value}; "bits" are those that the paper counts

    def overrides_of_runs(self) -> list[list[str]]:
        """Overrides of each run, besides the user's own."""
        common = [f"+experiment={self.experiment}", *self.overrides]
        if self.method is not None:
            quoted = self.method.replace("'", r"\'")
            common.append(f"method='{quoted}'")
        return [[*common, f"name={name}", *_other_seed(seed)] for seed, name in enumerate(self.names_of_runs())]

    def names_of_runs(self) -> list[str]:
        return [self.name, *(f"{self.name}_seed{seed}" for seed in range(1, self.seeds))]


def _other_seed(seed: int) -> list[str]:
    """Overrides for another calibration seed: other prompts, noise and codec draws, but the same images to score."""
    if seed == 0:
        return []
    captions = f"finetune.trajectories.seed={1 + seed}"  # 1 is the default, and not one of the calibration's seeds
    noise = f"finetune.trajectories.noise_seed={seed}"
    return ["calibration.order=shuffled", *(f"{key}={seed}" for key in SEEDED), captions, noise]


@dataclass(frozen=True)
class Pair:
    """Two rows whose images people compare."""

    left: str
    right: str
    published: float | None = None  # % of votes for the left one


@dataclass(frozen=True)
class Table:
    """A file of experiments/: rows are experiments and columns are metrics; with pairs, rows are pairs."""

    name: str
    title: str
    model: str  # the rows' model; a run on another model writes <name>-<model>
    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    source: str | None = None  # where the published values are from
    tolerances: dict[str, float] = field(default_factory=dict)  # {metric: difference that still counts as reproduced}
    published_protocol: dict = field(default_factory=dict)  # {key: value} needed to count as reproduced
    mixed: tuple[str, ...] = ()  # protocol keys in which rows differ on purpose
    deviations: tuple[str, ...] = ()  # differences from the paper, or from the table whose twin this is
    gpu_hours: str | None = None  # an estimate, and its basis
    pairs: tuple[Pair, ...] = ()
    made_by: str | None = None  # the command that makes it, where it is no file of experiments/

    def command(self, model: str) -> str:
        if self.made_by is not None:
            return self.made_by
        return f"python run.py table={self.name}" + ("" if model == self.model else f" model={model}")

    def row(self, name: str) -> Row:
        found = next((row for row in self.rows if row.name == name), None)
        if found is None:
            known = [row.name for row in self.rows]
            like = nearest(name, known)
            raise UserError(
                f"table {self.name} has no row {name!r}: did you mean {like}? its rows are {', '.join(known)}"
            )
        return found


def read_table(path: Path) -> Table:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        like = f"did you mean {nearest(path.stem, known)}? " if known else ""
        raise UserError(f"there is no table {path.stem!r}: {like}experiments/ holds {', '.join(known)}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not {"title", "model", "rows", "metrics"} <= set(content):
        raise UserError(f"{path} must give title, model, rows and metrics")
    if not isinstance(content["rows"], list) or not isinstance(content["metrics"], list):
        raise UserError(f"{path}: rows and metrics must be lists")
    common = content.pop("overrides", ())
    rows = tuple(_read_row(row, path, common) for row in content.pop("rows"))
    pairs = tuple(_made(Pair, pair, path) for pair in content.pop("pairs", ()))
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    table = _made(Table, lists | {"name": path.stem, "rows": rows, "pairs": pairs}, path)
    _check(table, path)
    return table


def _read_row(row, path: Path, common: Iterable[str]) -> Row:
    """Read a row: the name of an experiment, or a mapping of Row's fields.

    common: overrides of every row, applied before its own.
    """
    if isinstance(row, str):
        row = {"name": row, "experiment": row}
    if isinstance(row, dict):
        row = row | {"overrides": (*common, *row.get("overrides", ()))}
    made = _made(Row, row, path)
    return made if made.method is not None else replace(made, method=_method_of(made.experiment, path))


def _method_of(experiment: str, path: Path) -> str | None:
    from omegaconf import OmegaConf

    file = path.parent.parent / "conf" / "experiment" / f"{experiment}.yaml"
    return OmegaConf.load(file).get("method") if file.is_file() else None


def _made(kind: type, fields, path: Path):
    try:
        return kind(**fields)
    except TypeError as error:
        raise UserError(f"{path}: {fields} is no {kind.__name__.lower()}: {error}") from error


def _check(table: Table, path: Path) -> None:
    """Check that published values have a column and a source, and that pairs compare rows of the table."""
    for row in table.rows:
        strange = sorted(set(row.published) - {"bits", *table.metrics})
        if strange:
            raise UserError(f"{path}: {row.name} has published {strange[0]}, which is not among the metrics")
    if table.source is None and (
        any(row.published for row in table.rows) or any(pair.published is not None for pair in table.pairs)
    ):
        raise UserError(f"{path} has published values and no source: say where they are from")
    for pair in table.pairs:
        table.row(pair.left), table.row(pair.right)
