"""What is said, and when, while data are waited for."""

import pytest

from blockllm_cli.runner import watchdog
from blockllm_cli.runner.watchdog import Watchdog


@pytest.fixture
def waiting(monkeypatch):
    """A watchdog that is asked every half second, of a clock of its own, and the seconds at which it spoke."""
    now, spoken = [100.0], []
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    looks_on = Watchdog(lambda: False, lambda line: spoken.append((now[0] - 100, line)), 600)

    def wait(seconds: float, doing: str = "a shard") -> list[float]:
        looks_on.link.doing = doing
        spoken.clear()
        end = now[0] + seconds
        while now[0] < end:
            looks_on()
            now[0] += 0.5
        return [at for at, _ in spoken]

    wait.now, wait.spoken = now, spoken
    return wait


def test_a_wait_is_spoken_of_after_ten_seconds_then_ever_less_but_once_a_minute(waiting):
    assert waiting(270) == [10, 20, 40, 80, 140, 200, 260]
    assert waiting.spoken[1][1] == "waiting for data since 20.0 s: a shard"


def test_nothing_is_said_of_a_wait_that_nothing_is_known_of(waiting):
    assert waiting(100, doing="") == []


def test_a_pause_between_two_waits_makes_them_two(waiting):
    assert waiting(15) == [10]
    waiting.now[0] += 5
    assert waiting(25) == [30, 40]
    assert waiting.spoken[0][1] == "waiting for data since 10.0 s: a shard"
