"""Imports run one way, every experiment composes, and nothing heavy is imported where speed is promised."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from composed import compose

from vqdm.errors import UserError
from vqdm.metrics.families import FAMILIES
from vqdm.report.experiments import read_table

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (  # a file may import from its own room and from those further down; neighbours on a line do not meet
    ("pipeline", "api"),
    ("report",),
    ("stages",),
    ("few_step",),
    ("hub", "distillation"),
    ("codecs", "acceleration"),
    ("weights", "calibration", "metrics"),
    ("models", "prompts"),
    ("config",),
    ("runs", "tiny"),
    ("errors", "seeds"),
)
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
NEEDED = {  # what a user has to say
    "file": ["calibration.path=captions.json"],
    "local": ["model.path=model.safetensors"],
    "compress": ["model.path=model.safetensors"],
    "matching": ["quantize=trellis3", "few_step=dmd"],
}
LARGEST_FILE, LONGEST_FUNCTION, MOST_ENTRIES = 400, 60, 20  # lines, lines, entries of vqdm/
INNER_LOOPS = {  # nested loops that numba compiles as one: each works on buffers that the next reads
    "vqdm.codecs.additive_kernels.search_groups",
    "vqdm.codecs.additive_kernels.search_rows",
}
FACTORIES = (
    "eye", "zeros", "ones", "empty", "full", "arange", "linspace", "tensor", "scalar_tensor", "normal", "rand", "randn",
    "randint", "randperm",
)  # fmt: skip
CODEC_NAMES = re.compile(r'"(rtn|gptq|svdquant|adaround|additive|trellis)"')
TABLES = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = sorted((ROOT / "vqdm").rglob("*.py"))


def _room(module: str) -> str:
    return module.split(".")[1]


@functools.cache
def _own_imports() -> dict[str, set[str]]:
    """{module: the modules of vqdm that it imports anywhere}"""
    return {
        _module(path): {name for name in _imports(path) if name.startswith("vqdm.") and _is_module(name)}
        for path in SOURCES
    }


def _checked_files() -> list[Path]:
    return [*SOURCES, *sorted((ROOT / "scripts").rglob("*.py")), ROOT / "run.py"]


def _functions(path: Path) -> dict[str, int]:
    """{name with its module: lines from def to the end}"""
    nodes = ast.walk(ast.parse(path.read_text()))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {f"{_module(path)}.{node.name}": node.end_lineno - node.lineno + 1 for node in functions}


def test_files_are_short():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in _checked_files()}
    assert {path: length for path, length in lengths.items() if length > LARGEST_FILE} == {}


def test_functions_are_short():
    lengths = {name: length for path in _checked_files() for name, length in _functions(path).items()}
    assert {name for name, length in lengths.items() if length > LONGEST_FUNCTION} == INNER_LOOPS


def test_the_library_has_few_entries():
    entries = [path for path in (ROOT / "vqdm").iterdir() if path.stem[0] != "_" and path.name != "py.typed"]
    assert len(entries) <= MOST_ENTRIES


def test_codecs_are_named_in_their_rooms_only():
    """Other rooms ask a codec's card (`vqdm.codecs.codec.Codec`); `weights` has the kinds of the file format."""
    naming = {_room(_module(path)) for path in SOURCES if CODEC_NAMES.search(path.read_text())}
    assert naming == {"codecs", "config", "weights"}


def test_imports_run_one_way_through_the_rooms():
    order = {room: line for line, rooms in enumerate(ROOMS) for room in rooms}
    assert {_room(_module(path)) for path in SOURCES if path.parent.name != "vqdm" or path.stem[0] != "_"} == set(order)
    upwards = [
        f"{module} → {name}"
        for module, names in _own_imports().items()
        if module not in ("vqdm", "vqdm._imports", "vqdm.__main__")
        for name in sorted(names)
        if _room(name) != _room(module) and order[_room(name)] <= order[_room(module)]
    ]
    assert not upwards


def test_files_import_each_other_in_no_circle():
    sorter = graphlib.TopologicalSorter(_own_imports())
    sorter.prepare()  # CycleError names the circle


def _is_module(name: str) -> bool:
    relative = Path(*name.split("."))
    return (ROOT / relative.with_suffix(".py")).is_file() or (ROOT / relative / "__init__.py").is_file()


@pytest.mark.parametrize(
    ("library", "allowed"),
    [("wandb", {"vqdm.runs.tracker"}), ("hydra", {"vqdm.config.compose", "vqdm.__main__"}), ("pickle", set())],
)
def test_a_library_is_imported_in_one_place(library, allowed):
    users = {_module(p) for p in SOURCES if any(n.split(".")[0] == library for n in _imports(p))}
    assert users <= allowed


def test_test_modules_have_names_of_their_own():
    """Pytest imports them by name alone, and takes two of one name for the same."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_nothing_uses_torchs_global_random_state():
    names = ("torch.manual_seed", "np.random.seed", "random.seed")
    users = {_module(path) for path in SOURCES if any(name in path.read_text() for name in names)}
    assert users == {"vqdm.seeds"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name):
    config = compose(f"+experiment={name}", *NEEDED.get(name, []))
    assert config.table == name or config.name == name


def _compose_rows(rows) -> list:
    return [compose(*overrides) for row in rows for overrides in row.overrides_of_runs()]


@pytest.mark.parametrize("name", TABLES)
def test_every_table_names_experiments(name):
    table = read_table(ROOT / "experiments" / f"{name}.yaml")
    assert {row.experiment for row in table.rows} <= set(EXPERIMENTS)
    assert compose(*table.rows[-1].overrides_of_runs()[0]).model.name == table.model


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_a_table_composes_and_has_its_columns(name):
    table = read_table(ROOT / "experiments" / f"{name}.yaml")
    configs = _compose_rows(table.rows)
    assert {config.model.name for config in configs} == {table.model}
    names = [config.name for config in configs]
    assert len(names) == len(set(names)), "run records would overwrite each other"
    for config in configs:
        scored = {metric for family in config.evaluate.metrics for metric in FAMILIES[family].metrics}
        assert set(table.metrics) <= scored, config.name
    assert all(config.method is not None for config in configs)


@pytest.mark.parametrize(
    "kind", ["model", "few_step", "calibration", "finetune", "cache", "evaluate", "tracker", "tiny_train"]
)  # and quantize in config/test_codec_options.py
def test_every_option_of_a_group_composes(kind):
    names = sorted(path.stem for path in (ROOT / "conf" / kind).glob("*.yaml"))
    for name in names:
        quantized = ["quantize=trellis3"] if kind == "finetune" else []
        compose(f"{kind}={name}", *NEEDED.get(name, quantized))


def test_the_command_line_wins_over_the_experiment():
    config = compose("+experiment=tiny_rtn4", "model=tiny_outlier", "quantize.bits=2")
    assert (config.model.name, config.quantize.bits, config.quantize.kind) == ("tiny_outlier", 2, "rtn")


def test_a_path_makes_the_source_a_file():
    config = compose("+experiment=tiny_vq3", "calibration.path=captions.json")
    assert (config.calibration.source, config.evaluate.prompts.source) == ("file", "tiny")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["quantize=rtn", "quantize.bits=0"], "quantize.bits=0"),
        (["quantize=rtn", "quantize.bits=9"], "1 to 8"),
        (["quantize=rtn", "quantize.bits=2.5"], "whole number for rtn"),
        (["quantize=gptq", "quantize.bits=2.5"], "whole number for gptq"),
        (["quantize=vq3", "quantize.bits=2.5"], "whole number for additive"),
        (["quantize=trellis", "quantize.bits=9"], "1 to 8"),
        (["quantize=qdiffusion4", "quantize.clip=hessian"], "not one of mse, minmax for adaround"),
        (["quantize=vq3", "quantize.recipe=paper", "quantize.codebooks=model"], "with each layer"),
        (["quantize=gptq4", "quantize.damping=-1"], "must be 0 to 100"),
        (["quantize=gptq4", "quantize.tokens_per_call=0"], "at least 1"),
        (["calibration.timesteps=often"], "calibration.timesteps"),
        (["quantize=vq3", "quantize.group_size=7"], "no whole number"),
        (["quantize.kind=nonsense"], "quantize.kind='nonsense'"),
        (["device=tpu"], "device='tpu'"),
        (["model.builtin=null"], "exactly one of"),
        (["model.path=somewhere"], "exactly one of"),
        (["model.builtin=null", "model.hub_id=some/model"], "model.revision"),
        (["calibration=file"], "calibration.path"),
        (["evaluate.batch_size=0"], "evaluate.batch_size=0"),
        (["evaluate.bootstrap=1"], "evaluate.bootstrap=1 must be 2"),
        (["evaluate.steps=0"], "evaluate.steps=0"),
        (["evaluate.metrics=[]"], "scores nothing"),
        (["evaluate.metrics=[tiny,fid]"], "'fid' is not one of tiny"),
    ],
)
def test_options_that_make_no_sense_are_refused(overrides, said):
    with pytest.raises(UserError) as error:
        compose(*overrides)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_every_tensor_is_made_on_a_device_that_is_named():
    """torch.set_default_device would make it elsewhere, and a GPU refuses a generator of the CPU's."""
    unnamed = [
        f"{_module(path)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]
    modules = [name.split(":")[0] for name in unnamed]
    empty = {"vqdm.weights.base", "vqdm.weights.trellis", "vqdm.acceleration.stored_cache"}
    assert set(modules) <= empty, f"{unnamed}: say device="  # but what is loaded into is made where its module is


def test_what_a_plan_needs_imports_no_torch():
    modules = "vqdm.pipeline, vqdm.stages.graph.experiment, vqdm.report.experiments"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
