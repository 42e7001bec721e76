#!/bin/sh
# Set up (once) and run the tests: no network, no GPU. Further arguments go to pytest.
#   sh scripts/run_tests.sh
set -eu
sh "$(dirname "$0")/setup.sh"
cd "$(dirname "$0")/.."
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec env OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadgroup "$@"
