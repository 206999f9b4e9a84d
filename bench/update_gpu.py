"""The update alone on a CUDA device, by Triton's kernel, against the bandwidth of a copy there.

    python bench/update_gpu.py
    python bench/update_gpu.py --layers 8 --repeats 50

The tensors are the matrices of decoder layers of the 1b size. Bytes are those that have to move for the entries that
are kept: weight, both moments and the master copy read and written, gradient and index read. Where entries are gathered
the device moves more, whole sectors of 32 bytes, so that their share of the copy's bandwidth cannot reach that of whole
tensors. `host` is the time in which the host hands an update over; while it is below the update's it costs nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from blockllm_cli.optim.adam import AdamRule
from blockllm_cli.optim.blocks import Piece
from blockllm_cli.optim.entries import Entries
from blockllm_cli.optim.kept_state import KeptState
from blockllm_cli.optim.precision import Precision, PrecisionName, precision_of
from blockllm_cli.optim.triton_adam import why_no_triton

HIDDEN, INTERMEDIATE = 2048, 5461
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]
PRECISIONS: list[PrecisionName] = ["fp32", "bf16", "bf16_master", "bf16_papers"]
FORMS = {"whole": 1.0, "rows 10 %": 0.1, "bitmap 10 %": 0.1, "list 2 %": 0.02}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="decoder layers")
    parser.add_argument("--repeats", type=int, default=20, help="updates timed, of which the median counts")
    options = parser.parse_args()
    device = torch.device("cuda")
    if not torch.cuda.is_available() or (reason := why_no_triton(device)) is not None:
        raise SystemExit("no CUDA device" if not torch.cuda.is_available() else reason)
    copy = _copy_bandwidth(options.repeats)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}; a copy moves {copy / 1e9:,.0f} GB/s")
    print("precision    rounding    entries              number       ms  host ms    GB/s  share")
    for name in PRECISIONS:
        for rounding in ("nearest",) if name == "fp32" else ("nearest", "stochastic"):
            precision = precision_of(name, rounding)
            for form, share in FORMS.items():
                state = _state(precision, form, share, options.layers)
                seconds, host = _timed_update(state, precision, options.repeats)
                speed = _moved(state, precision) / seconds
                print(
                    f"{name:12} {rounding:11} {form:12} {state.entries:14,} {seconds * 1e3:8.3f} {host * 1e3:8.3f} "
                    f"{speed / 1e9:7,.0f} {speed / copy:6.1%}"
                )


def _copy_bandwidth(repeats: int) -> float:
    """Bytes read and written in a second."""
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _timed(lambda: target.copy_(source), repeats)[0]


def _state(precision: Precision, form: str, share: float, layers: int) -> KeptState:
    """State of the kept share of all tensors."""
    state = KeptState(AdamRule(weight_decay=0.1, decoupled=True), precision, 0)
    shapes = {f"{layer}.{number}": shape for layer in range(layers) for number, shape in enumerate(SHAPES)}
    state.attach({name: torch.randn(shape, device="cuda").to(precision.weights) for name, shape in shapes.items()})
    for name, shape in shapes.items():
        entries = Entries.all(shape)
        if form.startswith("rows"):
            entries = Entries.of(torch.rand(shape[0], device="cuda").lt(share).nonzero().view(-1), shape, "row")
        elif share < 1:
            entries = Entries.of(torch.rand(shape, device="cuda").view(-1).lt(share).nonzero().view(-1), shape)
        state.start(Piece(name, shape), entries)
    return state


def _timed_update(state: KeptState, precision: Precision, repeats: int) -> tuple[float, float]:
    """Seconds of an update on the device, and of handing it over."""
    dtype = precision.accumulator(1)
    gradients = {record.key: torch.randn(record.entries.count, device="cuda").to(dtype) for record in state.records()}
    return _timed(lambda: state.update(gradients, lambda _: 1e-3, 1), repeats)


def _timed(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of `work` on the device, and until it returns on the host."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    device_times, host_times = [], []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device is kept busy until all is handed over, so that it does not wait for the host in between.
        torch.cuda._sleep(20_000_000)
        begin.record()
        started = time.perf_counter()
        work()
        host_times.append(time.perf_counter() - started)
        end.record()
        torch.cuda.synchronize()
        device_times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(device_times), statistics.median(host_times)


def _moved(state: KeptState, precision: Precision) -> int:
    """Bytes that an update has to move."""
    twice = precision.weights.itemsize + 2 * precision.moments.itemsize + (4 if precision.has_master else 0)
    index = sum(record.entries.bytes for record in state.records())
    written_only = precision.weights.itemsize if precision.has_master else 0  # the master copy is what is read
    return state.entries * (2 * twice - written_only + precision.accumulator(1).itemsize) + index


if __name__ == "__main__":
    main()
