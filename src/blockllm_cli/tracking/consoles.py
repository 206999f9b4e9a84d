"""The two consoles of a process, made so that the environment can neither break lines nor fill files with escapes."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from rich.console import Console


class LastingConsole(Console):
    """A console whose reader may go away: the work goes on, and log.txt has what is no longer printed."""

    def print(self, *objects: Any, **named: Any) -> None:
        """Print, or lose the line where the disk behind it is full: no reason to end a run of days.

        What stays in the buffer of the stream fails again when the process flushes it at its end, which is told then.
        """
        with contextlib.suppress(OSError):
            super().print(*objects, **named)

    def on_broken_pipe(self) -> None:
        """Print no more, and let what is buffered vanish: Python flushes once more at its end, and would complain."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def output_console() -> Console:
    """Where results and the narration go: stdout."""
    return _console(stderr=False)


def error_console() -> Console:
    """Where errors and warnings go: stderr."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    is_terminal = stream is not None and stream.isatty()
    console = LastingConsole(
        stderr=stderr, highlight=False, soft_wrap=True, width=_width(stream.fileno()) if is_terminal else None
    )
    # FORCE_COLOR makes a terminal of everything; it asks for colours, not for a file full of redrawn bars.
    console.is_interactive = console.is_interactive and is_terminal
    return console


def _width(descriptor: int) -> int | None:
    """Columns where COLUMNS says more than the terminal has, such as after it was made narrower; else rich decides."""
    named = os.environ.get("COLUMNS", "")
    real = os.get_terminal_size(descriptor).columns
    return real if named.isdigit() and 0 < real < int(named) else None
