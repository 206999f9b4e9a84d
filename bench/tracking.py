"""What following a run in W&B costs it: time of an update, processor time and memory of the tracking process.

    OMP_NUM_THREADS=1 python bench/tracking.py
    OMP_NUM_THREADS=1 python bench/tracking.py --minutes 5 --log-every 1

One run of the quickstart recipe is tracked offline. Its tracking process is halted and let go on in turn, some rows
each, so that a busy machine slows both alike; `running / halted` is the ratio of the times of an update, of the medians
and of the fastest. What the process takes from the machine is counted as well: where all cores are busy, its processor
seconds in a second of training are what the training cannot have, and where one is idle they cost nothing. In the
training process itself the tracker is one call per logged row, timed alone.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from blockllm_cli import metrics
from blockllm_cli.recipe.sections import Tracking
from blockllm_cli.tracking.run_folder import METRICS, RECIPE, RunFolder
from blockllm_cli.tracking.wandb_feed import RowFeed
from blockllm_cli.tracking.wandb_process import Tracker, task_of

ROWS = 3  # in a turn, after one that is left out: part of it belongs to the turn before
LIMIT = 0.005  # of the time of an update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of training")
    parser.add_argument("--log-every", type=int, default=5, help="updates between two rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run = subprocess.Popen(_command(place, options.log_every), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            folder = _wait_for_rows(Path(place))
            _compare(run, folder, options.minutes, options.log_every)
        finally:
            run.send_signal(signal.SIGTERM)
            run.wait()


def _command(place: str, log_every: int) -> list[str]:
    sets = [f"run.output={place}", "run.threads=1", "schedule.steps=1000000", "schedule.warmup=0", "evaluate.every=0"]
    sets += ["checkpoint.every=0", f"tracking.log_every={log_every}", "tracking.wandb=offline"]
    program = str(Path(sys.executable).with_name("blockllm"))
    return [program, "pretrain", "quickstart", *(part for each in sets for part in ("--set", each))]


def _wait_for_rows(place: Path) -> Path:
    """The run folder, once some rows are there: the tracking process has begun by then."""
    while True:
        for path in place.glob(f"*/*/{METRICS}"):
            if path.read_bytes().count(b"\n") > 3:
                return path.parent
        time.sleep(0.1)


def _compare(run: subprocess.Popen[bytes], folder: Path, minutes: float, log_every: int) -> None:
    tree = _tracking_processes(run)
    begun = _processor_seconds(tree)
    seconds: dict[str, list[float]] = {"running": [], "halted": []}
    feed, started, halted_for = RowFeed(folder / METRICS), time.perf_counter(), 0.0
    list(feed.new())
    while time.perf_counter() - started < 60 * minutes:
        for phase, times in seconds.items():
            for process in tree:
                process.send_signal(signal.SIGSTOP if phase == "halted" else signal.SIGCONT)
            turn = time.perf_counter()
            times += _take(feed, ROWS + 1)[1:]
            halted_for += time.perf_counter() - turn if phase == "halted" else 0.0
    for process in tree:
        process.send_signal(signal.SIGCONT)
    spent = (_processor_seconds(tree) - begun) / (time.perf_counter() - started - halted_for)
    resident = [process.memory_info().rss / 2**20 for process in tree]
    call, update = _call_seconds(folder), statistics.median(seconds["running"])
    _print(seconds, begun=begun, spent=spent, resident=resident, call_share=call / (log_every * update), call=call)


def _take(feed: RowFeed, count: int) -> list[float]:
    """Seconds of an update in the next `count` rows."""
    found: list[float] = []
    while len(found) < count:
        found += [row[metrics.STEP_SECONDS] for row in feed.new() if metrics.STEP_SECONDS in row]
        time.sleep(0.01)
    return found


def _tracking_processes(run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process that reads the run folder, and that which W&B starts."""
    while True:
        for child in psutil.Process(run.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # some live for a moment only
                if "blockllm_cli.tracking.wandb" in child.cmdline() and child.children():
                    return [child, *child.children(recursive=True)]
        time.sleep(0.1)


def _processor_seconds(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def _call_seconds(folder: Path) -> float:
    """Seconds of the call that the training makes after each row, on a process that has nothing to say."""
    with tempfile.TemporaryDirectory() as place:
        other = RunFolder(Path(place))
        (other.path / RECIPE).write_bytes((folder / RECIPE).read_bytes())
        task = task_of(other, "bench", Tracking(), mode="offline", server=None, goes_on=True)
        with Tracker.start(task, print, print) as tracker:
            count, began = 10_000, time.perf_counter()
            for _ in range(count):
                tracker.poll()
            return (time.perf_counter() - began) / count


def _print(
    seconds: dict[str, list[float]],
    *,
    begun: float,
    spent: float,
    resident: Sequence[float],
    call_share: float,
    call: float,
) -> None:
    running, halted = seconds["running"], seconds["halted"]
    median = statistics.median(running) / statistics.median(halted)
    print(f"{len(running)} rows each; an update takes {statistics.median(halted) * 1e3:.1f} ms (median, halted)")
    print(f"running / halted: {median:.4f} of the medians, {min(running) / min(halted):.4f} of the fastest")
    print(f"processor seconds: {begun:.2f} to begin, then {spent:.4%} of a core (limit {LIMIT:.1%})")
    print(f"in the training process: {call * 1e6:.1f} us a row, {call_share:.5%} of the updates between two rows")
    print(f"resident: {' + '.join(f'{size:.0f}' for size in resident)} MiB")


if __name__ == "__main__":
    main()
