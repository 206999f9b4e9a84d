"""A run that waits for data is told so, once and for good reason."""

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
