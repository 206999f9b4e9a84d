"""`blockllm data prepare` as processes: Ctrl-C, and two at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PATIENCE_SECONDS = 120


def command(tiny, *arguments: str) -> list[str]:
    program = str(Path(sys.executable).with_name("blockllm"))
    cache = f"data.cache={tiny.folder / 'cache'}"
    return [program, "data", "prepare", str(tiny.recipe), "--all", "--workers", "2", "--set", cache, *arguments]


def start(tiny, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(tiny, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def large_shards(tiny) -> str:
    """A small shard and one that takes far longer than a signal; the pattern for both."""
    folder = tiny.folder / "large"
    folder.mkdir()
    lines = [line for path in sorted(tiny.corpus.glob("train-*.jsonl")) for line in path.read_text().splitlines()]
    for name, times in (("a", 1), ("b", 300)):
        (folder / f"{name}.jsonl").write_text(("\n".join(lines) + "\n") * times)
    return f"data.train={folder}/*.jsonl"


def manifests(tiny) -> list[Path]:
    return sorted((tiny.folder / "cache").rglob("manifest.json"))


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_keeps_what_is_finished(tiny):
    """The signal reaches the workers too, as it does from a terminal."""
    shards = large_shards(tiny)
    process = start(tiny, "--set", shards)
    end = time.monotonic() + PATIENCE_SECONDS
    while len(manifests(tiny)) < 2:  # the validation shard and the small one
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, complaint
    assert "stopped; 2 shards are prepared and stay" in complaint
    assert "Traceback" not in complaint
    assert len(manifests(tiny)) == 2
    assert list((tiny.folder / "cache").rglob("*.tmp")) == []


@pytest.mark.slow
def test_two_at_once_make_each_shard_once(tiny):
    processes = [start(tiny, "--json") for _ in range(2)]
    outputs = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    reports = [json.loads(printed) for printed, _ in outputs]
    assert [len(report["made"]) + len(report["found"]) for report in reports] == [4, 4]
    assert sum(len(report["made"]) for report in reports) == 4
    assert len(manifests(tiny)) == 4
