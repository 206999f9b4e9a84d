"""Single answers of a hub: what they say of when to come back, and of which bytes they are."""

import email.utils
import threading
import time
from types import SimpleNamespace

import pytest

from blockllm_cli.hub.http import check_status, fetch_range
from blockllm_cli.hub.link import FaultError
from support.hub import C4, Rule


def answer(status, **headers):
    return SimpleNamespace(
        status_code=status, reason_phrase="", headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry_After": "7"}, 7),
        ({"Retry_After": "soon"}, None),
        ({"ratelimit": '"api";r=0;t=55'}, 55),
        ({"ratelimit": '"api";r=3;t=55'}, None),
        ({"Retry_After": "2", "ratelimit": '"api";r=0;t=55'}, 2),
    ],
)
def test_when_to_come_back(headers, seconds):
    with pytest.raises(FaultError) as caught:
        check_status(answer(429, **headers), "http://hub/file")
    assert caught.value.retry_after == seconds


def test_a_date_to_come_back_at():
    with pytest.raises(FaultError) as caught:
        check_status(answer(503, Retry_After=email.utils.formatdate(time.time() + 100, usegmt=True)), "http://hub/file")
    assert 60 < caught.value.retry_after <= 100


@pytest.mark.parametrize(("total", "good"), [("10", True), ("*", True), ("11", False)])
def test_a_part_of_a_file_of_the_listed_size_or_of_one_not_told(hub, total, good):
    def part(asked):
        asked.send(206, b"cdef", {"Content-Range": f"bytes 2-5/{total}"})
        return True

    hub.rules = [Rule("file", part)]
    sink = bytearray()
    url = f"{hub.url}/datasets/{C4}/resolve/main/file"
    if good:
        fetch_range(url, 2, 6, 10, sink, threading.Event())
        assert sink == b"cdef"
    else:
        with pytest.raises(FaultError, match="asked for bytes from 2 of 10, got bytes 2-5/11"):
            fetch_range(url, 2, 6, 10, sink, threading.Event())


def test_bytes_are_asked_for_as_they_are(hub):
    seen = []

    def part(asked):
        seen.append(dict(asked.headers))
        asked.send(206, b"cdef", {"Content-Range": "bytes 2-5/10"})
        return True

    hub.rules = [Rule("file", part)]
    fetch_range(f"{hub.url}/datasets/{C4}/resolve/main/file", 2, 6, 10, bytearray(), threading.Event())
    headers = {name.lower(): value for name, value in seen[0].items()}
    assert headers["accept-encoding"] == "identity"
    assert headers["range"] == "bytes=2-5"
