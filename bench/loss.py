"""Time and peak memory of the chunked loss against plain logits and cross-entropy, forward and backward, on the CPU.

    OMP_NUM_THREADS=1 python bench/loss.py
    OMP_NUM_THREADS=1 python bench/loss.py --chunk-mib 8 16 32 64 128

All ways are timed in turn, so that a busy machine slows them alike; the ratio is that of the medians. Peak memory is
what the operators allocate over the inputs, counted by the profiler's memory events. `bench/run.py --only loss` keeps
times of the same ways, each in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from blockllm_cli.model.loss import chunked_nll
from speed.workers.loss_alone import tensors, ways

SHAPES = ((1024, 512, 32000), (2048, 256, 4096))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--chunk-mib", type=int, nargs="*", default=[], help="chunk sizes to compare with the default")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {options.repeats}")
    columns = f"{'way':>28}{'time / plain':>14}{'plain ms':>10}{'peak MiB':>10}"
    print(f"{'tokens, hidden, vocabulary':<28}{'dtype':<10}{columns}")
    for tokens, hidden_size, vocab_size in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            compare(tokens, hidden_size, vocab_size, dtype, options.chunk_mib, options.repeats)


def compare(
    tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, chunk_mib: list[int], repeats: int
) -> None:
    """Print a line for each way of making the loss and for each chunk size."""
    hidden, head, targets = tensors(tokens, hidden_size, vocab_size, dtype)

    def chunked(chunk: int) -> Callable[[], Tensor]:
        return lambda: chunked_nll(hidden, head, targets, scale=1 / tokens, chunk=chunk)[0]

    versions = ways(hidden, head, targets)
    for mib in chunk_mib:
        versions[f"{mib} MiB"] = chunked(max(1, mib * 2**20 // (vocab_size * dtype.itemsize)))

    def run(version: Callable[[], Tensor]) -> None:
        version().backward()
        hidden.grad = head.grad = None

    seconds: dict[str, list[float]] = {name: [] for name in versions}
    for repeat in range(repeats + 1):
        for name, version in versions.items():
            start = time.perf_counter()
            run(version)
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, version in versions.items():
        peak = peak_bytes(lambda version=version: run(version)) / 2**20
        print(
            f"{f'{tokens}, {hidden_size}, {vocab_size}':<28}{str(dtype).removeprefix('torch.'):<10}{name:>28}"
            f"{medians[name] / medians['plain']:>14.2f}{medians['plain'] * 1e3:>10.0f}{peak:>10.0f}"
        )


def peak_bytes(run: Callable[[], None]) -> int:
    """Most bytes that `run` holds at once over what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main()
