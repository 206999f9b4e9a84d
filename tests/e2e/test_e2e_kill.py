"""What no handler can catch: SIGKILL at random moments, a disk that takes no more (R10)."""

import random
import resource
import signal
import subprocess
import time

import pytest

from support.tiny import equal_rows, equal_tensors

SETS = (
    "schedule.steps=2000",
    "checkpoint.every=3",
    "evaluate.every=100",
    "data.workers=1",
    "batch.micro_rows=4",
)
ARGUMENTS = [part for each in SETS for part in ("--set", each)]


def rows_written(tiny) -> int:
    runs = tiny.folder / "runs" / "tiny"
    if not runs.is_dir():
        return 0
    newest = max(runs.iterdir(), default=None)
    path = newest / "metrics.jsonl" if newest else None
    return path.stat().st_size if path and path.exists() else 0


@pytest.mark.slow
def test_ten_kills_at_random_moments_and_the_run_is_the_unbroken_one_r10(tiny):
    whole = tiny.call(*ARGUMENTS)
    assert whole.returncode == 0, whole.stderr
    unbroken = tiny.newest()
    unbroken.folder.rename(tiny.folder / "unbroken")
    unbroken.folder = tiny.folder / "unbroken"
    draw = random.Random(20)
    for _ in range(10):
        again = ["--resume", "latest"] if any((tiny.folder / "runs" / "tiny").glob("*/recipe.toml")) else []
        with (
            (tiny.folder / "stderr").open("w") as stderr,
            subprocess.Popen(tiny.command(*ARGUMENTS, *again), stdout=subprocess.DEVNULL, stderr=stderr) as process,
        ):
            before, deadline = rows_written(tiny), time.monotonic() + 120
            while rows_written(tiny) == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(draw.uniform(0.0, 0.6))
            assert process.poll() is None, f"over before it was killed: {(tiny.folder / 'stderr').read_text()}"
            process.send_signal(signal.SIGKILL)
    done = tiny.call(*ARGUMENTS, "--resume", "latest")
    assert done.returncode == 0, done.stderr
    resumed = tiny.newest()
    assert resumed.summary["status"] == "completed"
    equal_rows(unbroken.metrics, resumed.metrics)
    equal_tensors(unbroken.tensors(), resumed.tensors())
    assert unbroken.rows == resumed.rows
    assert not list((resumed.folder / "checkpoints").glob(".*"))


def test_a_disk_that_takes_no_more_keeps_the_old_checkpoints_r10(tiny):
    whole = tiny.run("checkpoint.every=3")
    cut = tiny.run("checkpoint.every=3", stop_after=5)

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = tiny.call("--set", "checkpoint.every=3", "--resume", str(cut.folder), preexec_fn=small_files)
    assert done.returncode == 6, done.stderr
    assert "method.safetensors" in done.stderr or "step-00000006" in done.stderr
    assert "free" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in (cut.folder / "checkpoints").iterdir()) == [
        "latest",
        "step-00000003",
        "step-00000005",
    ]
    resumed = tiny.run("checkpoint.every=3", resume="latest")
    equal_rows(whole.metrics, resumed.metrics)
    equal_tensors(whole.tensors(), resumed.tensors())
