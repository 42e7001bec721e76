"""The commands of the README as a user meets them, a checkout to run them in, and the rules that make them small."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tiny_world import ROOT, environment, run_script

LINKED = (
    *("run.py", "conf", "experiments", "scripts", "tests", "vqdm", ".ci"),
    *("requirements.txt", "constraints.txt", "pyproject.toml", "environment.yml"),
)
FIRST_WORDS = r"(python|pip|conda|sh|bash|wandb|hf|git|accelerate|torchrun) \S"
NOBODY = "http://127.0.0.1:9"  # a proxy that is not there: no command reaches the network


def blocks_of(text: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def inline_code(text: str) -> list[str]:
    """What stands between backticks in the prose, on one line."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands_of(text: str) -> list[str]:
    """Every line of the shell blocks and every command of the prose that is whole; each once, comments taken off."""
    bodies = [body.replace("\\\n", " ") for language, body in blocks_of(text) if language == "sh"]
    lines = [line.partition(" #")[0].strip() for body in bodies for line in body.splitlines()]
    inline = [re.sub(r"^\+experiment=", "python run.py +experiment=", code) for code in inline_code(text)]
    inline = [code.removeprefix("time ") for code in inline]
    whole = [code for code in inline if re.match(FIRST_WORDS, code) and not re.search(r"run\.py$|=$", code)]
    return list(dict.fromkeys([*filter(None, lines), *whole]))


@dataclass(frozen=True)
class Done:
    """A command that has ended. place: the checkout it ran in; began: seconds since 1970."""

    place: Path
    began: float
    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one line that an error is; not a traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.err, self.err
        return lines[0]


@dataclass(frozen=True)
class Rule:
    """How the commands that match are made small, and what must then be true."""

    pattern: str
    check: Callable[[Done], None]
    more: tuple[str, ...] = ()  # arguments at the end
    instead: dict[str, str] = field(default_factory=dict)  # parts of the command by others
    after: tuple[str, ...] = ()  # commands of the README whose results this one needs
    prepare: Callable[["Checkout"], None] | None = None  # what the README takes for granted, such as a user's own file
    code: int = 0

    def ends_at_once(self, command: str) -> bool:
        """An error before any work, or no Python at all: cheap enough for every run of the tests."""
        return not self.after and (self.code != 0 or re.search(r"python |\.sh\b", command) is None)

    def small(self, command: str) -> str:
        for part, other in self.instead.items():
            assert part in command, f"{self.pattern}: {part!r} is no longer in {command!r}"
            command = command.replace(part, other)
        return f"{command} {shlex.join(self.more)}".strip()


class Checkout:
    """A checkout whose results, data and models are its own; each command of the README runs in it once."""

    def __init__(self, place: Path, rules: list[Rule]):
        self.place, self.rules, self.done = place, rules, {}
        for name in LINKED:
            (place / name).symlink_to(ROOT / name)
        _link_environment(place / ".venv")

    def rule_of(self, command: str) -> Rule:
        found = [rule for rule in self.rules if re.fullmatch(rule.pattern, command)]
        assert len(found) == 1, (
            f"{len(found)} rules match the README's `{command}`: write one for it in tests/test_readme_commands.py, "
            "with what makes the command small and with a check of what the README promises of it"
        )
        return found[0]

    def execute(self, command: str) -> Done:
        if command not in self.done:
            rule = self.rule_of(command)
            for earlier in rule.after:
                self.execute(earlier)
            if rule.prepare is not None:
                rule.prepare(self)
            self.done[command] = self.shell(rule.small(command))
            assert self.done[command].code == rule.code, self.done[command].err[-3000:]
        return self.done[command]

    def shell(self, command: str) -> Done:
        """A script of ours runs in this process, which is the same and faster; all else in a shell."""
        began, words = time.time(), shlex.split(command)
        if _is_ours(command):
            done = run_script(words[1], *words[2:], cwd=self.place, **self._environment())
        else:
            done = subprocess.run(
                ["sh", "-c", command], cwd=self.place, env=self._environment(), capture_output=True, text=True,
                timeout=600,
            )  # fmt: skip
        return Done(self.place, began, done.returncode, done.stdout, done.stderr)

    def _environment(self) -> dict[str, str]:
        proxies = {name: NOBODY for kind in ("http_proxy", "https_proxy") for name in (kind, kind.upper())}
        ours = environment(
            PATH=f"{self.place / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}", PYTHONPATH=str(ROOT),
            NETRC=str(self.place / "netrc"), no_proxy="127.0.0.1,localhost", **proxies,
        )  # fmt: skip
        return {name: value for name, value in ours.items() if not name.startswith(("PYTEST_", "WANDB_API", "HYDRA_"))}


def _is_ours(command: str) -> bool:
    """`python run.py …` or `python scripts/….py …`, without jobs of its own or anything for a shell to do."""
    bare = re.sub(r"'[^']*'", "", command)
    starts = re.match(r"python (run|scripts/\w+)\.py( |$)", command)
    return starts is not None and not re.search(r"--multirun|--workers|[*?&|;<>$`]", bare)


def _link_environment(venv: Path) -> None:
    """This environment as the checkout's own, marked as installed, so that scripts/setup.sh has nothing to do."""
    venv.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != "installed":
            (venv / entry.name).symlink_to(entry)
    assert (venv / "bin" / "python").exists(), f"{sys.prefix} has no bin/python"
    mark = "cat requirements.txt constraints.txt pyproject.toml | cksum >.venv/installed"
    subprocess.run(["sh", "-c", mark], cwd=venv.parent, check=True)
