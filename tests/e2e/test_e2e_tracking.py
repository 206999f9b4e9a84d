"""The tracker beside the installed command: what is left when a run is killed, and what a run ends with (R33)."""

import contextlib
import os
import signal
import subprocess
import time

import psutil
import pytest

from support.tiny import equal_rows
from support.wandb_file import offline_runs
from support.wandb_server import KEY
from support.wandb_stub import Stub

QUICK = ("--set", "schedule.steps=6", "--set", "schedule.warmup=0", "--set", "evaluate.every=3")
DEADLINE = 60.0


def wait_for(what):
    """The first true answer of `what`, or None when it takes too long."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    return None


@pytest.fixture
def environment(tmp_path):
    """A machine without a key of W&B, which its user has not switched off."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_its_resume_is_the_same_wandb_run_r33(tiny, environment):
    sets = ("--set", "schedule.steps=4000", "--set", "checkpoint.every=20")
    run = subprocess.Popen(tiny.command(*sets), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)

    def tracking():
        """The tracking process and that of W&B, once both are there."""
        with contextlib.suppress(psutil.NoSuchProcess):  # others live for a moment only
            for child in psutil.Process(run.pid).children():
                names = [each.name() for each in child.children()]
                if "blockllm_cli.tracking.wandb" in child.cmdline() and "wandb-core" in names:
                    return [child, *child.children()]
        return []

    left = wait_for(tracking)
    is_saved = wait_for(lambda: (tiny.newest().folder / "checkpoints" / "latest").exists())
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert left
    assert is_saved
    assert wait_for(lambda: not any(process.is_running() for process in left))
    killed = tiny.newest()
    (found,) = offline_runs(killed.folder)
    assert found.exit_code == 1
    assert found.rows == killed.metrics[: len(found.rows)]
    assert len(found.rows) >= 20
    until = str(len(killed.metrics) + 50)
    done = tiny.call(*sets, "--resume", str(killed.folder), "--stop-after", until, env=environment)
    assert done.returncode == 0, done.stderr
    (again,) = offline_runs(killed.folder)
    assert (again.run.run_id, again.exit_code) == (killed.folder.name, 0)
    assert again.rows == killed.metrics


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ["raise:init", "raise:log", "hang:log", "hang:finish"])
def test_the_command_ends_as_without_a_tracker_r33(tiny, tmp_path, monkeypatch, environment, behaviour):
    untracked = tiny.call(*QUICK, "--set", "tracking.wandb=off", env=environment)
    before = tiny.newest()
    stub = Stub(tmp_path, monkeypatch, behaviour)
    seen = {name: os.environ[name] for name in ("PYTHONPATH", "STUB", "STUB_CALLS")}
    done = tiny.call(*QUICK, "--set", "tracking.wandb=offline", env={**environment, **seen}, timeout=DEADLINE)
    assert done.returncode == untracked.returncode == 0
    assert done.stderr.startswith("warning: W&B: ")
    assert done.stderr.count("\n") == 1
    equal_rows(before.metrics, tiny.newest().metrics)
    assert stub.names()
    assert wait_for(lambda: not any(map(psutil.pid_exists, stub.pids())))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["no key", "no network"])
def test_without_key_or_network_a_run_is_the_same_and_offline_r33(tiny, environment, what):
    if what == "no network":
        environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}
    done = tiny.call(*QUICK, env=environment, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("W&B: ") == 1
    assert "W&B: offline, since" in done.stdout
    (found,) = offline_runs(tiny.newest().folder)
    assert found.rows == tiny.newest().metrics
    assert found.exit_code == 0
