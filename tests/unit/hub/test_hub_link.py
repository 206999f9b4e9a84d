"""Patience with a hub: pauses, their end, and that nothing keeps a run from stopping."""

import socket
import threading
import time

import pytest

from blockllm_cli.errors import InputError, StopRequested
from blockllm_cli.hub.link import (
    OFFLINE_VARIABLES,
    FaultError,
    Link,
    Patience,
    in_background,
    offline_variable,
    why_out_of_reach,
)
from support.hub import Rule, refused


def never():
    return False


class Clock:
    """Time that passes only in pauses, so that minutes of them are over at once."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.pass_)

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_pauses_double_up_to_a_minute_and_end_with_the_patience(clock):
    events = []
    patience = Patience(Link(200, events.append), "a file", never)
    with pytest.raises(InputError, match=r"a file: gone \(attempts: 11; data.retry_seconds = 200 allows no more\)"):
        while True:
            patience.wait(FaultError("gone"))
    assert [event["pause_seconds"] for event in events] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 16.5]
    assert clock.now == pytest.approx(1200)
    assert events[0] == {"kind": "network", "what": "a file", "reason": "gone", "attempt": 1, "pause_seconds": 0.5}


def test_the_last_attempt_is_at_the_end_of_the_time(clock):
    begun = clock.now
    patience = Patience(Link(10), "a file", never)
    for _ in range(5):
        patience.wait(FaultError("gone"))
    assert clock.now - begun == pytest.approx(10)


def test_progress_begins_the_time_anew(clock):
    patience = Patience(Link(10), "a file", never)
    for _ in range(20):
        patience.wait(FaultError("gone"))
        patience.wait(FaultError("gone"))
        patience.progress()


def test_what_the_server_asks_for_is_kept_and_more_than_is_left_ends_it(clock):
    patience = Patience(Link(100), "a file", never)
    begun = clock.now
    patience.wait(FaultError("429", retry_after=42))
    assert clock.now - begun == pytest.approx(42)
    with pytest.raises(InputError, match="asks to be left alone for 59 s"):
        patience.wait(FaultError("429", retry_after=59))


def test_a_stop_ends_a_pause(clock):
    patience = Patience(Link(100), "a file", lambda: clock.now > 1003)
    with pytest.raises(StopRequested):
        patience.wait(FaultError("503", retry_after=50))
    assert clock.now < 1004


def test_a_call_that_hangs_is_left_behind_when_a_stop_is_asked_for_or_the_time_is_up():
    hang = threading.Event()
    try:
        with pytest.raises(StopRequested):
            in_background(hang.wait, lambda: True, limit=60)
        with pytest.raises(FaultError, match="no answer within 0 s"):
            in_background(hang.wait, never, limit=0.1)
    finally:
        hang.set()


def test_the_result_or_the_error_of_a_call_comes_through():
    def fail():
        raise InputError("as it is")

    assert in_background(lambda: 7, never, limit=60) == 7
    with pytest.raises(InputError, match="as it is"):
        in_background(fail, never, limit=60)


@pytest.mark.parametrize("variable", OFFLINE_VARIABLES)
def test_the_offline_variables_of_the_libraries_are_heeded(hub, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert why_out_of_reach(never) == f"{variable} is set"
    assert hub.requests == []
    monkeypatch.setenv(variable, "0")
    assert offline_variable() is None


def at(monkeypatch, endpoint):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)


def test_any_answer_is_one_a_refusal_too(hub):
    hub.rules = [Rule("/", refused(503), times=1), Rule("/", refused(404), times=1)]
    assert why_out_of_reach(never) is None
    assert why_out_of_reach(never) is None


def test_a_refused_connection_is_said(hub, monkeypatch):
    at(monkeypatch, "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached (ConnectError" in why_out_of_reach(never)


def test_a_password_in_the_address_is_not_said(hub, monkeypatch):
    at(monkeypatch, "http://someone:secret@127.0.0.1:9")
    said = why_out_of_reach(never)
    assert said.startswith("http://127.0.0.1:9 cannot be reached")
    assert "secret" not in said


def test_an_answer_that_is_no_http_is_none(hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def babble():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"babble\r\n\r\n")

        babbling = threading.Thread(target=babble, daemon=True)
        babbling.start()
        at(monkeypatch, f"http://127.0.0.1:{listening.getsockname()[1]}")
        assert "RemoteProtocolError" in why_out_of_reach(never)
        babbling.join()


def test_a_hub_that_does_not_answer_costs_no_more_than_the_limit(hub, monkeypatch):
    monkeypatch.setattr("blockllm_cli.hub.link.PROBE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "no answer within 0 s" in why_out_of_reach(never)


def test_a_name_look_up_that_hangs_is_within_the_limit_too(hub, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr("blockllm_cli.hub.link.PROBE_SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(60) and [])
    at(monkeypatch, "http://hub.invalid")
    try:
        assert "no answer within 0 s" in why_out_of_reach(never)
    finally:
        over.set()


@pytest.mark.parametrize("url", ["not an address", "file:///etc/hostname", "http://[", "http://127.0.0.1:99999"])
def test_an_odd_address_is_no_answer(hub, monkeypatch, url):
    at(monkeypatch, url)
    assert f"{url} cannot be reached" in why_out_of_reach(never)
