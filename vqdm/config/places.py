"""Where the configurations lie: beside the package in a checkout, inside it when it was installed."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_HOME = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent
CONF, EXPERIMENTS = _HOME / "conf", _HOME / "experiments"
SCRIPT = _PACKAGE.parent / "run.py"  # a checkout's command, which needs no installed package
