#!/bin/sh
# What to run on the day a GPU is there, in order of worth, each step ten minutes at most: results/gpu_day/*.json, gathered
# into results/published/gpu_<device>.json and .md. Stopped, the same command goes on with the next step.
#   sh scripts/gpu_day.sh
#   sh scripts/gpu_day.sh --rehearse     every step with tiny shapes on the CPU: three minutes, nothing published
set -eu
sh "$(dirname "$0")/setup.sh"
cd "$(dirname "$0")/.."
exec .venv/bin/python scripts/gpu_day.py "$@"
