"""The end of a process that has driven the fake device."""

import os
import sys

import torch

_status = 0


def pytest_sessionfinish(session, exitstatus):
    global _status
    _status = int(exitstatus)


def pytest_unconfigure(config):
    """Leave at once: Python's end stops the thread of the device's backward passes where C++ takes it for a failure."""
    if torch._C._get_privateuse1_backend_name() == "fakedev":
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(_status)
