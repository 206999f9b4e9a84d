"""The tracker is a guest: whatever W&B does, the run is the same, ends in time, and leaves no process (R33)."""

import sys
import time

import psutil
import pytest

from blockllm_cli.errors import DivergedError
from blockllm_cli.tracking import wandb_process
from blockllm_cli.tracking.wandb_process import Task, Tracker
from support.tiny import equal_rows, equal_tensors
from support.wandb_stub import Stub

SETS = ("schedule.steps=6", "schedule.warmup=0", "evaluate.every=3")
PATIENT = 60.0


def gone(pids: set[int]) -> bool:
    """Whether none of these processes is left; the system is given a moment to remove them."""
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(psutil.pid_exists, pids))


@pytest.fixture(scope="module")
def untracked(tmp_path_factory, tiny_corpus, tiny_tokenizer):
    from support.tiny import TinyRuns

    return TinyRuns(tmp_path_factory.mktemp("untracked"), tiny_corpus, tiny_tokenizer).run(*SETS)


@pytest.mark.parametrize(
    ("behaviour", "seconds", "word"),
    [
        ("raise:import", PATIENT, "import is broken"),
        ("raise:init", PATIENT, "init is broken"),
        ("raise:log", PATIENT, "log is broken"),
        ("raise:summary", PATIENT, "summary is broken"),
        ("raise:finish", PATIENT, "finish is broken"),
        ("die:log", PATIENT, "ended early, with -11"),
        ("hang:import", 3.0, "not all was sent"),
        ("hang:log", 3.0, "not all was sent"),
        ("hang:finish", 3.0, "not all was sent"),
    ],
)
def test_a_run_does_not_depend_on_its_tracker_r33(tiny, tmp_path, monkeypatch, untracked, behaviour, seconds, word):
    stub = Stub(tmp_path, monkeypatch, behaviour)
    monkeypatch.setattr(wandb_process, "FINISH_SECONDS", seconds)
    result = tiny.run(*SETS, "tracking.wandb=offline")
    equal_rows(untracked.metrics, result.metrics)
    equal_tensors(untracked.tensors(), result.tensors())
    assert result.summary["status"] == "completed"
    said = [line for line in "".join(result.output.splitlines()).split("W&B: ")[1:] if "offline: files in" not in line]
    assert len(said) == 1, result.output
    assert word in said[0]
    assert "blockllm track" in said[0]
    assert stub.names()[-1] == behaviour.partition(":")[2] or behaviour.startswith("raise")
    assert gone(stub.pids())


def test_a_run_that_fails_keeps_its_failure_and_tells_it_r33(tiny, tmp_path, monkeypatch):
    stub = Stub(tmp_path, monkeypatch, "")
    with pytest.raises(DivergedError):
        tiny.run(*SETS, "schedule.learning_rate=1e30", "tracking.wandb=offline")
    assert stub.names()[-2:] == ["alert", "finish"]
    assert gone(stub.pids())


def test_a_hanging_tracker_does_not_hide_why_a_run_failed_r33(tiny, tmp_path, monkeypatch):
    stub = Stub(tmp_path, monkeypatch, "hang:log")
    monkeypatch.setattr(wandb_process, "FINISH_SECONDS", 0.5)
    with pytest.raises(DivergedError):
        tiny.run(*SETS, "schedule.learning_rate=1e30", "tracking.wandb=offline")
    assert gone(stub.pids())


def test_what_the_tracker_started_ends_with_it_r33(tiny, tmp_path, monkeypatch):
    stub = Stub(tmp_path, monkeypatch, "spawn:log")
    monkeypatch.setattr(wandb_process, "FINISH_SECONDS", 2.0)
    tiny.run(*SETS, "tracking.wandb=offline")
    assert stub.names()[-1] == "child"
    assert gone(stub.pids())


def test_the_process_is_apart_from_the_run_and_follows_its_task_alone_r33(tiny, tmp_path, monkeypatch):
    """Of its own session, so that Ctrl-C is for the run; a folder `wandb` where the run starts is not the package."""
    stub = Stub(tmp_path, monkeypatch, "")
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    monkeypatch.setenv("WANDB_RESUME", "must")
    tiny.run(*SETS, "tracking.wandb=offline")
    facts = stub.facts()
    assert facts["session"] in stub.pids()
    assert facts["safe_path"]
    assert not {"WANDB_RUN_ID", "WANDB_RESUME"} & facts["variables"].keys()


def test_without_the_package_a_run_is_untracked_and_says_so_once(tiny, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = tiny.run(*SETS)
    assert result.output.count("W&B") == 1
    assert "W&B: off, since the package wandb is not installed" in result.output
    assert not (result.folder / "wandb").exists()


@pytest.mark.parametrize("disabled", ["recipe", "environment"])
def test_a_run_that_is_not_to_be_tracked_says_nothing_and_starts_nothing(tiny, monkeypatch, disabled):
    def started(*_):
        raise AssertionError

    monkeypatch.setattr(Tracker, "start", started)
    if disabled == "recipe":
        monkeypatch.delenv("WANDB_MODE")
    result = tiny.run(*SETS, *(["tracking.wandb=off"] if disabled == "recipe" else []))
    assert "W&B" not in result.output
    assert not (result.folder / "wandb").exists()


def test_a_process_that_cannot_be_started_is_no_failure_of_the_run(tiny, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    result = tiny.run(*SETS, "tracking.wandb=offline")
    assert "W&B: off, since its process cannot be started" in "".join(result.output.splitlines())
    assert result.summary["status"] == "completed"


def test_a_task_survives_its_line():
    task = Task("/r", "online", None, True, "id", "n", "p", None, "g", ("a", "b"), 8.0)
    assert Task.of_line(task.line()) == task
    assert task.line().count(b"\n") == 1


def test_the_id_stays_when_the_folder_is_renamed(tiny, tmp_path, monkeypatch):
    Stub(tmp_path, monkeypatch, "")
    result = tiny.run(*SETS, "tracking.wandb=offline", stop_after=2)
    folder = wandb_process.RunFolder(result.folder)
    moved = wandb_process.RunFolder(result.folder.rename(tmp_path / "elsewhere"))
    from blockllm_cli.recipe.sections import Tracking

    task = wandb_process.task_of(moved, "n", Tracking(), mode="offline", server=None, goes_on=True)
    assert task.id == folder.run_id != moved.run_id
    assert (task.project, task.entity, task.tags) == ("blockllm", None, ())
    monkeypatch.setenv("WANDB_PROJECT", "of-the-user")
    again = wandb_process.task_of(moved, "n", Tracking(group="g"), mode="offline", server=None, goes_on=True)
    assert (again.project, again.group) == ("of-the-user", "g")
