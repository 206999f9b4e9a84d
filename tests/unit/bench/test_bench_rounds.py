"""The turns of a case: repeats alternate, a peer that is not there or fails is said, time ends the rounds."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from speed import client
from speed.cases import OURS, Case, Contestant
from speed.client import PeerAbsentError, Worker, WorkerFailedError, python_of
from speed.rounds import run_case, starter

Log = list[str]


class FakeWorker:
    """Notes its turns; fails at the repeat it was told."""

    def __init__(self, label: str, log: Log, fails_at: int | None = None) -> None:
        self.label, self.log, self.fails_at = label, log, fails_at
        self.made = 0
        self.is_closed = False

    def ready(self) -> dict[str, Any]:
        return {"versions": {"torch": "2"}, "threads": 1}

    def repeat(self) -> dict[str, Any]:
        if self.made == self.fails_at:
            raise WorkerFailedError("ended with 1: out of memory")
        self.made += 1
        self.log.append(self.label)
        return {"wall": 0.5000000004, "cpu": 0.25, "step": self.made}

    def close(self) -> None:
        self.is_closed = True


def case_of(*labels: str, rounds: tuple[int, int] = (2, 3), warm_up: int = 1) -> Case:
    contestants = tuple(Contestant(label, OURS, "ours", {}) for label in labels)
    return Case("case", contestants, work=10, unit="tokens", warm_up=warm_up, rounds=rounds)


def started(workers: dict[str, FakeWorker]) -> Callable[[Contestant], Any]:
    return lambda contestant: workers[contestant.label]


def test_repeats_of_all_alternate_and_the_warm_up_is_not_counted() -> None:
    log: Log = []
    workers = {label: FakeWorker(label, log) for label in "ab"}
    result = run_case(case_of("a", "b"), 60, started(workers))
    assert sorted(log[:2]) == ["a", "b"]  # several may warm up at a time
    assert log[2:] == ["a", "b", "a", "b", "a", "b"]
    outcome = result.outcomes["a"]
    assert outcome.repeats[0] == {"wall": 0.5, "cpu": 0.25, "step": 2}
    assert (outcome.state, outcome.versions, outcome.facts) == ("measured", {"torch": "2"}, {"threads": 1})
    assert all(worker.is_closed for worker in workers.values())


def test_without_time_the_fewest_rounds_are_made() -> None:
    result = run_case(case_of("a", rounds=(2, 50)), 0, started({"a": FakeWorker("a", [])}))
    assert len(result.outcomes["a"].repeats) == 2


def test_a_peer_that_fails_is_said_and_the_others_go_on() -> None:
    log: Log = []
    workers = {"a": FakeWorker("a", log, fails_at=2), "b": FakeWorker("b", log)}
    result = run_case(case_of("a", "b"), 60, started(workers))
    assert result.outcomes["a"].state == "failed"
    assert result.outcomes["a"].reason == "ended with 1: out of memory"
    assert len(result.outcomes["b"].repeats) == 3
    assert workers["a"].is_closed


def test_a_peer_without_environment_is_absent(tmp_path: Path) -> None:
    def start(contestant: Contestant) -> Any:
        if contestant.label == "b":
            python_of("litgpt", tmp_path)
        return FakeWorker("a", [])

    outcome = run_case(case_of("a", "b"), 0, start).outcomes["b"]
    assert outcome.state == "absent"
    assert "make bench-setup" in outcome.reason
    with pytest.raises(PeerAbsentError):
        starter(tmp_path, 1)(Contestant("x", "torch", "plain", {}))


WORKER = """
from speed.workers.protocol import Requests
requests = Requests()
print("a library says something")
requests.ready(told=requests.spec["say"])
for repeat in requests.repeats():
    sum(range(20000))
    if requests.spec["say"] == "stop":
        raise SystemExit("no more")
    repeat["step"] = 7
"""


def worker_saying(word: str, tmp_path: Path) -> Worker:
    path = tmp_path / "worker.py"
    path.write_text(WORKER, encoding="utf-8")
    python = str(python_of(OURS, tmp_path))
    return Worker([python, str(path)], {"say": word}, 1, tmp_path)


def test_a_worker_answers_over_its_pipes_whatever_libraries_print(tmp_path: Path) -> None:
    worker = worker_saying("go", tmp_path)
    try:
        assert worker.ready() == {"versions": {}, "told": "go"}
        first, second = worker.repeat(), worker.repeat()
    finally:
        worker.close()
    assert first["step"] == second["step"] == 7
    assert 0 < first["wall"] < 60
    assert 0 <= first["cpu"] < 60


def test_the_end_of_a_worker_is_told_with_its_last_words(tmp_path: Path) -> None:
    worker = worker_saying("stop", tmp_path)
    try:
        worker.ready()
        with pytest.raises(WorkerFailedError, match=r"ended with 1: .*no more"):
            worker.repeat()
    finally:
        worker.close()


GARBLED = """
import os, sys
sys.stdin.readline()
os.write(1, b'{"ready": {"versi')
sys.stdin.readline()
"""


def test_an_answer_that_breaks_off_is_a_failure_and_not_the_end_of_the_sitting(tmp_path: Path) -> None:
    path = tmp_path / "worker.py"
    path.write_text(GARBLED, encoding="utf-8")
    worker = Worker([str(python_of(OURS, tmp_path)), str(path)], {}, 1, tmp_path)
    assert worker._process.stdin is not None
    worker._process.stdin.close()
    try:
        with pytest.raises(WorkerFailedError, match="ended with"):
            worker.ready()
    finally:
        worker.close()


BUSY = """
import subprocess, sys, time
from speed.workers.protocol import Requests
requests = Requests()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"])
requests.ready(child=child.pid)
for repeat in requests.repeats():
    time.sleep(20)
"""


def test_an_interrupt_ends_what_is_under_way_and_what_that_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for a repeat that takes long, and with no process left behind."""
    path = tmp_path / "worker.py"
    path.write_text(BUSY, encoding="utf-8")
    workers: list[Worker] = []

    def start(contestant: Contestant) -> Worker:
        workers.append(Worker([str(python_of(OURS, tmp_path)), str(path)], {}, 1, tmp_path))
        return workers[-1]

    children: list[psutil.Process] = []
    ready = Worker.ready

    def noted(worker: Worker) -> dict[str, Any]:
        facts = ready(worker)
        children.append(psutil.Process(facts["child"]))
        # As Ctrl-C does it: the main thread is told while it waits for the repeat.
        main = threading.main_thread().ident
        assert main is not None
        threading.Timer(0.3, signal.pthread_kill, [main, signal.SIGINT]).start()
        return facts

    monkeypatch.setattr(Worker, "ready", noted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_case(case_of("a"), 0, start)
    assert time.monotonic() - began < 15
    assert workers[0]._process.poll() is not None
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_an_environment_whose_interpreter_is_gone_is_absent(tmp_path: Path) -> None:
    (tmp_path / "torch" / "bin").mkdir(parents=True)
    (tmp_path / "torch" / ".ready").touch()
    (tmp_path / "torch" / "bin" / "python").symlink_to(tmp_path / "gone")
    with pytest.raises(PeerAbsentError, match="make bench-setup"):
        python_of("torch", tmp_path)


TELLING = """
import os, time
from speed.workers.protocol import Requests
requests = Requests()
requests.ready(threads=os.environ["OMP_NUM_THREADS"], path=os.environ["PYTHONPATH"])
for repeat in requests.repeats():
    time.sleep(20)
"""


def test_a_worker_is_told_its_threads_and_a_peer_nothing_of_our_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/ours")
    path = tmp_path / "worker.py"
    path.write_text(TELLING, encoding="utf-8")
    peer = tmp_path / "python"
    peer.symlink_to(sys.executable)
    said = []
    for python in (sys.executable, str(peer)):
        worker = Worker([python, str(path)], {}, 3, tmp_path)
        try:
            said.append(worker.ready())
        finally:
            worker.close()
    assert [each["threads"] for each in said] == ["3", "3"]
    assert ["/of/ours" in each["path"].split(":") for each in said] == [True, False]


def test_a_worker_that_gives_no_answer_in_time_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "worker.py"
    path.write_text(TELLING, encoding="utf-8")
    worker = Worker([sys.executable, str(path)], {}, 1, tmp_path)
    try:
        worker.ready()
        monkeypatch.setattr(client, "PATIENCE", 0.3)
        with pytest.raises(WorkerFailedError, match="ended with -9"):
            worker.repeat()
    finally:
        worker.close()
