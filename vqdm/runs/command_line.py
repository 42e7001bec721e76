"""Prepares the process of a script that imports it before torch: see vqdm/runs/entry.py."""

from vqdm.runs.entry import prepare, run_script

__all__ = ["run_script"]

prepare()
