#!/bin/sh
# Make .venv with the pinned packages, once; run again, it installs nothing. Sourced by run_demo.sh and run_tests.sh.
#   sh scripts/setup.sh            (PYTHON=/path/to/python3.12 to choose the interpreter)
set -eu
cd "$(dirname "$0")/.."

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: vqdm needs Python 3.11, 3.12 or 3.13, and found none of them${PYTHON:+ in PYTHON=$PYTHON}; install one, or set PYTHON=/path/to/it" >&2
    return 1
}

wanted=$(cat requirements.txt constraints.txt pyproject.toml | cksum)
if [ ! -x .venv/bin/python ] || [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    python=$(find_python)
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    echo "$wanted" >.venv/installed
fi
