"""How memory is kept, seen from outside: in processes of their own, since it cannot be undone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

KEPT_MIB = """
import os
from blockllm_cli.heap import keep_memory

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

keep_memory()
before = resident_mib()
block = bytearray(b"x") * (200 * 2**20)
del block
print(os.environ["THP_MEM_ALLOC_ENABLE"], resident_mib() - before)
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is what is set")


def kept(**environment: str) -> tuple[str, float]:
    """What torch is told about large pages, and MiB that a process still has of 200 that it has freed."""
    inherited = {name: value for name, value in os.environ.items() if "MALLOC" not in name and "THP_" not in name}
    done = subprocess.run(
        [sys.executable, "-c", KEPT_MIB], env=inherited | environment, capture_output=True, text=True, check=True
    )
    pages, mib = done.stdout.split()
    return pages, float(mib)


def test_freed_memory_stays_in_the_process_for_the_next_update() -> None:
    pages, mib = kept()
    assert pages == "1"
    assert mib > 190


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_about_memory_is_left_as_it_is(name: str) -> None:
    value = "glibc.malloc.mmap_threshold=131072" if name == "GLIBC_TUNABLES" else "131072"
    pages, mib = kept(**{name: value, "THP_MEM_ALLOC_ENABLE": "0"})
    assert pages == "0"
    assert mib < 10
