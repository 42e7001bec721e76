"""Imported by every script before torch, which prepares its process: see vqdm/runs/entry.py."""

from vqdm.runs.entry import prepare, run_script

__all__ = ["run_script"]

prepare()
