"""How memory is kept, seen from outside: in processes of their own, since it cannot be undone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from blockllm_cli.model.products import has_own_product

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

GROWN_MIB = """
import os
from blockllm_cli.heap import keep_memory

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

keep_memory()
import torch
from blockllm_cli.model.products import product
torch.set_num_threads(1)
x, matrix = torch.randn(700, 256), torch.randn(256, 688)
product(x, matrix)
before = resident_mib()
for rows in range(300, 700):
    product(x[:rows], matrix)
print(resident_mib() - before)
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


def grown(**environment: str) -> float:
    """MiB that a process has grown by after 400 products of different sizes."""
    inherited = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    done = subprocess.run(
        [sys.executable, "-c", GROWN_MIB], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.skipif(not has_own_product(torch.empty(0)), reason="only oneDNN remembers sizes")
def test_products_of_ever_new_sizes_do_not_fill_memory() -> None:
    """Batches differ in their number of targets; what the environment says about how many are remembered is left."""
    unbounded = grown(LRU_CACHE_CAPACITY="1024", ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")
    assert grown() < 0.6 * unbounded
