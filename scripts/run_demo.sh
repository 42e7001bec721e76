#!/bin/sh
# Set up (once) and run the demo: the table of the README. Further arguments go to run.py.
#   sh scripts/run_demo.sh
set -eu
sh "$(dirname "$0")/setup.sh"
cd "$(dirname "$0")/.."
exec .venv/bin/python run.py +experiment=demo "$@"
