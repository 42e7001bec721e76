"""Beginning and end of every command: text for any terminal, one line for what the user can mend, exit codes."""

import atexit
import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable

from vqdm.errors import UserError
from vqdm.runs.threads import bound_spinning

STOPPED = "stopped; the same command goes on from here"


def prepare() -> None:
    """Prepare the process before torch is imported: output in any encoding (×, —, ± may be escaped) and threads."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stream that is no file has none
            stream.reconfigure(errors="backslashreplace")
    bound_spinning()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # repeatable products; read when a GPU is first used


def reader_is_gone() -> bool:
    """True if nobody reads stdout any more, as after `… | head`; what is still written to it then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not poll.poll(0):  # errors alone are asked for
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def leave_at_once(number: int) -> None:
    """End the process that a signal has stopped, with the shell's exit code for it: 130 for Ctrl-C, 143 for SIGTERM.

    Threads at work are not waited for: a layer takes a minute, and what it would have written is whole or absent. What
    libraries do at the end is done: otherwise W&B's own process would stay.
    """
    with contextlib.suppress(Exception, KeyboardInterrupt):  # a second Ctrl-C: what it broke off was the last thing
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(128 + number)


def run_script(main: Callable[[], int | None]) -> None:
    """Run `main` to its end; UserError and OSError end in one line, Ctrl-C in exit code 130."""
    try:
        code = main()
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            sys.exit(0)
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    sys.exit(code)
