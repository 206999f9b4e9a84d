"""Looks on while data are waited for: says what for, and keeps what the network did for the run's events."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from blockllm_cli.hub.link import Link
from blockllm_cli.units import format_seconds

Event = dict[str, Any]

FIRST_WORD_SECONDS = 10.0
"""A wait as long as this is spoken of, and again whenever it has doubled."""

_LONGEST_SILENCE = 60.0
_SAME_WAIT_SECONDS = 1.0


class Watchdog:
    """A stop check for whoever waits for data; it is called every few hundredths of a second meanwhile.

    Args:
        stop: whether the run is asked to stop.
        say: told in words what is waited for, and of every fault of the network.
        retry_seconds: of the link to the hub.

    Attributes:
        link: to the hub; its reports come here, from any thread.
    """

    def __init__(self, stop: Callable[[], bool], say: Callable[[str], None], retry_seconds: float) -> None:
        self._stop = stop
        self._say = say
        self._reported: deque[Event] = deque()
        self._events: list[Event] = []
        self._began = self._asked = float("-inf")
        self._next_word = FIRST_WORD_SECONDS
        self.link = Link(retry_seconds, report=self._reported.append)

    def __call__(self) -> bool:
        """Whether to stop; looks on meanwhile."""
        now = time.monotonic()
        if now - self._asked > _SAME_WAIT_SECONDS:
            self._began, self._next_word = now, FIRST_WORD_SECONDS
        self._asked = now
        waited = now - self._began
        if waited >= self._next_word and self.link.doing:  # of what this machine does itself the terminal speaks
            self._say(f"waiting for data since {format_seconds(waited)}: {self.link.doing}")
            self._next_word += min(self._next_word, _LONGEST_SILENCE)
        self._hear()
        return self._stop()

    def events(self) -> list[Event]:
        """What the network did since the last call."""
        self._hear()
        events, self._events = self._events, []
        return events

    def _hear(self) -> None:
        while self._reported:
            event = self._reported.popleft()
            self._events.append(event)
            self._say(
                f"network: {event['what']}: {event['reason']} (attempt {event['attempt']}, the next in "
                f"{event['pause_seconds']:g} s)"
            )
