"""Freed memory goes back to the system: in processes of their own, as there is one heap each."""

import platform
import subprocess
import sys

import pytest
from tiny_world import ROOT, environment

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to")
# freeing a mapped block raises the size from which blocks are mapped, so that all later ones lie in the heap
SCRIPT = """
from pathlib import Path
from vqdm.runs.heap import return_free_pages, return_freed_memory
def held(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
bytearray(16 << 20)
blocks = [(bytearray(8 << 20), bytearray(1000)) for _ in range(20)]
between = [small for _, small in blocks]
del blocks
{then}
print(held() >> 20)
"""


def held(then="") -> int:
    """MiB of a process that has freed 160, with something small in use between them."""
    script = SCRIPT.format(then=then)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_heap_keeps_what_is_freed_until_it_is_asked():
    kept = held()
    assert kept > 140
    for asked in ("return_freed_memory()", "return_free_pages()"):
        assert held(then=asked) < kept - 120
