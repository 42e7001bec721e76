"""Help in our own words: what to run, groups with their choices, tables, and a sentence for every option.

The sentences are the comments of the dataclasses, so there is one place for each: behind a field, or above it.
"""

import dataclasses
import inspect
import re
import textwrap
from functools import cache
from pathlib import Path

from vqdm.config import options as schema
from vqdm.config.codecs import OPTIONS
from vqdm.config.compose import GROUPS
from vqdm.config.places import CONF, EXPERIMENTS
from vqdm.errors import UserError
from vqdm.runs.texts import nearest

WIDTH = 100
USAGE = """\
Usage: python run.py [-v] [--multirun] KEY=VALUE …

What to run:
  python run.py +experiment=demo                         the README's table, in minutes
  python run.py +experiment=tiny_trellis3                one row: calibrate, quantize, generate, evaluate
  python run.py +experiment=compress model.path=FILE output=DIR    your own model, small
  python run.py table=codecs [row=NAME]                  a table, or one row of it
  python run.py --multirun +experiment=tiny_codec quantize=rtn quantize.bits=2,3,4   a job for every value
  python run.py … plan=true                              only say what would run, its bytes, memory and time
The same command again goes on where it was stopped, and makes nothing twice.

To look things up:
  python run.py --help GROUP             a sentence per option: of quantize, finetune, …; "all" for every group
  python run.py list=experiments         also list=tables and list=runs (of results_dir)
  eval "$(python run.py -sc install=bash)"    completes options, groups and tables by the tab key (zsh too)
  -v says everything; --cfg job prints the composed configuration; --hydra-help is the help of the library below
"""
OF_RUN = "run"  # the group of options that are in none


def help_text(group: str | None = None) -> str:
    """The whole help; with a group, or "all", the options of it. UserError for a group that there is not."""
    if group is None:
        return "\n".join([USAGE, _groups(), _tables(), "Options of every run:", *_options(OF_RUN)])
    known = [OF_RUN, *OPTION_GROUPS]
    if group not in (*known, "all"):
        raise UserError(
            f"there is no group {group}: did you mean {nearest(group, known)}? there are {', '.join(known)}"
        )
    chosen = known if group == "all" else [group]
    return "\n\n".join("\n".join([f"{_heading(one)}", *_options(one)]) for one in chosen)


def _heading(group: str) -> str:
    if group == OF_RUN:
        return "Options of every run:"
    return "\n".join(textwrap.wrap(f"Options of {group}, which is one of {', '.join(choices(group))}:", WIDTH))


@cache
def choices(group: str) -> tuple[str, ...]:
    """What a group can be exchanged for: the files of conf/."""
    return tuple(sorted(path.stem for path in (CONF / group).glob("*.yaml")))


@cache
def tables() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in EXPERIMENTS.glob("*.yaml")))


OPTION_GROUPS = (
    "model",
    "calibration",
    "quantize",
    *(group for group in GROUPS if group not in ("model", "calibration")),
)


def _groups() -> str:
    lines = ["Groups, exchanged whole (quantize=gptq4), and their choices:"]
    for group in ("experiment", *OPTION_GROUPS, "hydra/launcher"):
        name = "+experiment" if group == "experiment" else group
        lines += _item(name, ", ".join(choices(group)), indent=16)
    return "\n".join(lines) + "\n"


def _tables() -> str:
    return "\n".join(["Tables (table=NAME):", *_item("", ", ".join(tables()), indent=16)]) + "\n"


def _item(name: str, text: str, *, indent: int) -> list[str]:
    """A name and, beside it, its text in as many lines as that takes; a long name has a line of its own."""
    lines = textwrap.wrap(text, WIDTH - indent) or [""]
    if len(name) + 3 > indent:
        return [f"  {name}", *(f"{'':{indent}}{line}" for line in lines)]
    return [f"  {name:{indent - 2}}{lines[0]}".rstrip(), *(f"{'':{indent}}{line}" for line in lines[1:])]


def _options(group: str) -> list[str]:
    """Lines for the options of a group: key, default, sentence."""
    if group == "quantize":
        return [line for kind, node in OPTIONS.items() if kind != "none" for line in _of_codec(kind, node)]
    node = schema.Config if group == OF_RUN else GROUPS[group]
    prefix = "" if group == OF_RUN else f"{group}."
    return [
        line for key, default, text in described(node, prefix) for line in _item(_shown(key, default), text, indent=40)
    ]


def _of_codec(kind: str, node: type) -> list[str]:
    about = " ".join((inspect.getdoc(node) or "").split())
    lines = textwrap.wrap(f"quantize={kind}: {about}", WIDTH, initial_indent="  ", subsequent_indent="    ")
    for key, default, text in described(node, "quantize."):
        lines += _item(_shown(key, default), text, indent=40)
    return lines


def _shown(key: str, default) -> str:
    return f"{key}={'null' if default is None else str(default).lower() if isinstance(default, bool) else default}"


def described(node: type, prefix: str = "") -> list[tuple[str, object, str]]:
    """(key, default, sentence) of every option of a dataclass and of those inside it; groups have help of their own."""
    found = []
    for field in dataclasses.fields(node):
        key = prefix + field.name
        if node is schema.Config and dataclasses.is_dataclass(field.type):
            continue
        if dataclasses.is_dataclass(field.type):
            found += described(field.type, f"{key}.")
        elif (field.name, prefix) != ("kind", "quantize."):
            found.append((key, _default(field), _with_choices(sentences(node)[field.name], field)))
    return found


def _default(field: dataclasses.Field):
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def _with_choices(text: str, field: dataclasses.Field) -> str:
    """The sentence as a command line has it: lists of names in full, null for None, and the choices."""
    text = re.sub(r"\b[A-Z]+_[A-Z]+\b", lambda name: ", ".join(getattr(schema, name[0])), text)
    text = text.replace("None", "null").replace("True", "true")
    allowed = [one for one in field.metadata.get("choices", ()) if one not in text]
    return "; ".join(filter(None, [text, f"one of {', '.join(field.metadata['choices'])}" if allowed else ""]))


@cache
def sentences(node: type) -> dict[str, str]:
    """{field: its comment} of a dataclass and its bases: the one behind the field, or else the lines above it."""
    found: dict[str, str] = {}
    for kind in reversed(node.__mro__):
        if dataclasses.is_dataclass(kind):
            found |= {
                name: text for name, text in _comments(inspect.getsource(kind)).items() if text or name not in found
            }
    return found


def _comments(source: str) -> dict[str, str]:
    found, above = {}, []
    for line in source.splitlines():
        if comment := re.fullmatch(r"    # (.*)", line):
            above.append(comment[1])
            continue
        if field := re.match(r"    (\w+): [^#]*(?:  # (.*))?$", line):
            found[field[1]] = field[2] or " ".join(above)
        above = []
    return found


def list_of(kind: str) -> str:
    """The experiments or the tables, each with its purpose. UserError for another kind."""
    if kind == "experiments":
        lines = [
            _item(name, _purpose(CONF / "experiment" / f"{name}.yaml"), indent=20) for name in choices("experiment")
        ]
    elif kind == "tables":
        lines = [_item(name, _title(EXPERIMENTS / f"{name}.yaml"), indent=24) for name in tables()]
    else:
        raise UserError(f"list={kind}: give list=experiments, list=tables or list=runs")
    return "\n".join(line for item in lines for line in item)


def _purpose(file: Path) -> str:
    """The first sentence of a configuration's header."""
    comments = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return next((line for line in comments if not line.startswith(("@package", "python "))), "")


def _title(file: Path) -> str:
    found = re.search(r'^title: "?(.*?)"?$', file.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""


def completions(line: str) -> list[str] | None:
    """What the tab key offers where Hydra knows nothing: names of tables, rows and lists; None: ask Hydra."""
    word = line.split()[-1] if line.split() and not line.endswith(" ") else ""
    key, given, value = word.partition("=")
    known = {"table": tables(), "list": ("experiments", "tables", "runs")}
    if not given or key not in known:
        return None
    return [f"{key}={name}" for name in known[key] if name.startswith(value)]
