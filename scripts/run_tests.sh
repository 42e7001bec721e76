#!/bin/sh
# Set up (once) and run the tests: no network, no GPU, some ten minutes on two cores. Further arguments go to pytest.
#   sh scripts/run_tests.sh
#   sh scripts/run_tests.sh --all        also the tests that are marked slow
set -eu
sh "$(dirname "$0")/setup.sh"
cd "$(dirname "$0")/.."
.venv/bin/ruff check .
.venv/bin/ruff format --check .
if [ "${1:-}" = --all ]; then
    shift
    set -- -m "slow or not slow" "$@"
fi
# a file's tests share fixtures, so one process runs them all
exec env OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
