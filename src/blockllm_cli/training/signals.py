"""A polite stop: SIGINT and SIGTERM set a flag that the loop looks at; a second signal leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Protocol


class Screen(Protocol):
    """Where something may be drawn that a signal must not spoil; both are called from a signal handler."""

    def stopping(self, message: str) -> bool:
        """Show the answer to the first signal; False where nothing is drawn, and stderr is to have it."""

    def leave(self) -> None:
        """The process ends at once: give back what was changed of the terminal."""


class StopFlag:
    """Remembers the first SIGINT or SIGTERM while it is entered as a context manager.

    Calling it tells whether a stop was asked for, which makes it the `should_stop` of everything that takes long.
    Outside the main thread Python takes no signal handlers; there the flag is never set by a signal.

    Args:
        screen: what is drawn meanwhile, such as a `Terminal`.
    """

    def __init__(self, screen: Screen | None = None) -> None:
        self._screen = screen
        self.signal_number: int | None = None
        self._former: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self.signal_number is not None

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            if self._screen is not None:
                self._screen.leave()
            os._exit(128 + number)
        self.signal_number = number
        message = f"{signal.Signals(number).name}: stopping in order; once more to leave at once"
        if self._screen is None or not self._screen.stopping(message):
            # Not print(): the signal may have come in the middle of one.
            os.write(2, f"\n{message}\n".encode())
