"""A run that waits for data is told so, once and for good reason."""

from blockllm_cli.runner import data_wait
from blockllm_cli.runner.data_wait import DataWait


def test_a_warning_comes_once_and_names_share_and_remedies():
    """R22: time spent waiting for data is a metric with a warning."""
    wait = DataWait(workers=1)
    assert wait.look(30.0, 10.0) is None  # what passed before the first look is the start
    assert wait.look(31.0, 20.0) is None
    warning = wait.look(40.0, 50.0)
    assert warning is not None
    assert "20 %" in warning
    assert "blockllm data prepare" in warning
    assert "data.workers (now 1)" in warning
    assert wait.look(90.0, 60.0) is None


def test_little_waiting_is_not_spoken_of():
    wait = DataWait(workers=1)
    assert [wait.look(waited, trained) for waited, trained in ((0, 0), (1.9, 1), (2, 40), (5, 100))] == [None] * 4
    assert wait.look(6, 100) is not None


def test_a_run_that_waits_says_so(tiny, monkeypatch):
    monkeypatch.setattr(data_wait, "MIN_WAITED_SECONDS", 0.0)
    monkeypatch.setattr(data_wait, "WARNED_SHARE", -1.0)
    run = tiny.run("schedule.steps=3", "schedule.warmup=1")
    assert run.output.count("of the training time so far went into waiting for data") == 1
    assert "went into waiting" not in (run.folder / "metrics.jsonl").read_text()
    waited = run.column("time/data_wait_seconds")
    assert waited == sorted(waited)
