"""What a person sees of a run: a live display on a terminal, whole lines elsewhere, and the same lines in log.txt.

Off a terminal nothing is redrawn: one plain line per logged update, lines at intervals from steps that take long, no
escape codes, no carriage returns. What is narrated goes to one console, warnings to another; docs/cli.md says which.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from blockllm_cli import metrics
from blockllm_cli.errors import BlockLLMError, InterruptedRunError
from blockllm_cli.tracking.consoles import error_console, output_console
from blockllm_cli.tracking.display import Display
from blockllm_cli.tracking.log import RunLog
from blockllm_cli.tracking.plain import printable
from blockllm_cli.tracking.progress import Activity, Step, Training, row_line

TOLD_SECONDS = 2.0
"""A step that took at least this long leaves a line that says so; shorter ones are in the log only."""
TICK_SECONDS = 1.0
SHOW_CURSOR = b"\x1b[?25h"


class Terminal:
    """Prints, and once a run folder exists writes the same to its log.

    Its methods may be called from any thread.

    Args:
        console: where to narrate; absent: stdout.
        warnings: where warnings go, which `quiet` does not silence; absent: stderr.
        quiet: narrate to the log alone.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        warnings: Console | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or output_console()
        self._warnings = warnings or error_console()
        self._quiet = quiet
        self._clock = clock
        self._lock = threading.RLock()
        self._log: RunLog | None = None
        self._early: list[tuple[float, str]] = []
        self._training: Training | None = None
        self._steps: list[Step] = []
        self._display: Display | None = None
        self._notice = ""
        self._notice_is_new = False
        self._spoken = clock()
        self._ticker: threading.Thread | None = None
        self._closed = threading.Event()

    @property
    def is_live(self) -> bool:
        """Whether progress is redrawn in place."""
        return self.console.is_interactive and not self._quiet

    def log_to(self, log: RunLog) -> None:
        """Write what was said so far, and all that will be, to `log`.

        Raises:
            StorageError: the disk refuses.
        """
        with self._lock:
            self._log = log
            for moment, line in self._early:
                log.write(line, moment)
            self._early.clear()

    def close(self) -> None:
        """Leave the display and the log."""
        self._closed.set()
        if self._ticker is not None:
            self._ticker.join()
            self._ticker = None
        with self._lock:
            self._training = None
            self._steps.clear()
            self._redraw()
            if self._log is not None:
                self._log.close()
                self._log = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # The disk may be what failed: then the first error is the one to show.
            with contextlib.suppress(BlockLLMError):
                self._record_end(error)
        self.close()

    def say(self, line: str) -> None:
        """One line for the person and for the log."""
        with self._lock:
            self.record(line)
            self._print(line)

    def warn(self, line: str) -> None:
        """One line that also `--quiet` lets through, begun with `warning: `; on stderr, and in the log."""
        with self._lock:
            self.record(f"warning: {line}")
            # What is redrawn on the same screen must know of every line on it.
            on_display = self._display is not None and self._warnings.is_terminal
            _put(self.console if on_display else self._warnings, f"warning: {line}")

    def record(self, line: str) -> None:
        """One line for the log alone."""
        with self._lock:
            if self._log is None:
                self._early.append((time.time(), line))
            else:
                self._log.write(line)

    @contextmanager
    def progress(self, description: str, *, total: float | None = None, unit: str = "") -> Iterator[Step]:
        """A long step: a bar on a terminal, elsewhere a line every ten seconds; a short one shows nothing.

        Args:
            description: what is done, such as `tokenising the validation set`.
            total: how much there is to do; None where nobody knows (then the time so far is shown).
            unit: of `total`, in the plural; `bytes` are shown as KiB, MiB and GiB.

        Yields:
            The step: call `advance(n)` or `update(done, total)` as often as you like, it costs nothing.
        """
        step = Step(description, total, unit, self._clock())
        with self._lock:
            if self._training is None:
                self.record(f"{description} ...")
            self._steps.append(step)
            self._spoken = self._clock()
            self._redraw()
            self._start_ticker()
        try:
            yield step
        except BaseException:
            with self._lock, contextlib.suppress(BlockLLMError):
                self._leave(step)
                self.record(step.interruption(self._clock()))
            raise
        with self._lock:
            self._leave(step)
            now = self._clock()
            # Inside of the training loop the rows tell the time it took.
            is_told = step.seconds(now) >= TOLD_SECONDS and self._training is None
            (self.say if is_told else self.record)(step.conclusion(now))

    def start_live(self, *, steps: int, done: int) -> None:
        """Begin the display of the training loop."""
        with self._lock:
            self._training = Training(steps, done, self._clock())
            self._spoken = self._clock()
            self._redraw()
            self._start_ticker()

    def stop_live(self) -> None:
        """End the display of the training loop."""
        with self._lock:
            self._training = None
            self._redraw()

    def advance(self, step: int) -> None:
        """An update is done."""
        if self._training is not None:
            self._training.step = step

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics: a line in the log; on a terminal the live display, else the same line."""
        with self._lock:
            training = self._training
            line = training.line(row, self._clock()) if training else row_line(row, row[metrics.STEP])
            self.record(line)
            if training is not None:
                training.row |= {key: value for key, value in row.items() if value is not None}
            if self._display is None or metrics.PERPLEXITY in row:
                self._print(line)

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """A table of two columns; plain aligned lines off a terminal and in the log."""
        width = max(len(name) for name, _ in rows)
        lines = [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
        with self._lock:
            for line in lines:
                self.record(line)
            if not self.is_live:
                for line in lines:
                    self._print(line)
                return
            table = Table(title=Text(printable(title)), show_header=False, title_justify="left")
            for row in rows:
                table.add_row(*(Text(printable(cell)) for cell in row))
            self.console.print(table, soft_wrap=False)

    def tick(self) -> None:
        """Say how far the innermost activity is, if it is time; called every second by a thread of this object."""
        with self._lock:
            self._record_notice()
            activity = next(reversed(self._activities()), None)
            now = self._clock()
            if activity is None or now - self._spoken < activity.patience(now):
                return
            self._spoken = now
            words = activity.words(now)
            self.record(words)
            if not self.is_live:
                self._print(words)

    def stopping(self, message: str) -> bool:
        """Show the answer to a signal where the display is; False where there is none to show it.

        Safe in a signal handler: it only leaves a word for the next redraw.
        """
        self._notice, self._notice_is_new = message, True
        return self._display is not None

    def leave(self) -> None:
        """Undo what must not outlive the process, which ends at once; safe in a signal handler."""
        if self.is_live:
            with contextlib.suppress(OSError, ValueError):
                os.write(self.console.file.fileno(), SHOW_CURSOR + b"\n")

    def _print(self, line: str) -> None:
        self._spoken = self._clock()
        if not self._quiet:
            _put(self.console, line)

    def _activities(self) -> tuple[Activity, ...]:
        training = self._training
        return (*((training,) if training is not None else ()), *self._steps)

    def _leave(self, step: Step) -> None:
        self._steps.remove(step)
        self._redraw()

    def _redraw(self) -> None:
        """Begin the display when something goes on, end it when nothing does."""
        is_busy = bool(self._activities()) and self.is_live
        if is_busy and self._display is None:
            self._display = Display(self.console, self._activities, lambda: self._notice, self._clock)
        elif not is_busy and self._display is not None:
            self._display.stop()
            self._display = None

    def _record_notice(self) -> None:
        if self._notice_is_new:
            self._notice_is_new = False
            self.record(self._notice)

    def _start_ticker(self) -> None:
        if self._ticker is None and not self._closed.is_set():
            self._ticker = threading.Thread(target=self._keep_ticking, name="blockllm-terminal", daemon=True)
            self._ticker.start()

    def _keep_ticking(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            # A full disk is met by the main thread as well, which can end the run for it.
            with contextlib.suppress(BlockLLMError):
                self.tick()

    def _record_end(self, error: BaseException) -> None:
        """Log how it ended; where that is our own bug, with the traceback, which shows no values."""
        self._record_notice()
        if isinstance(error, InterruptedRunError | KeyboardInterrupt):
            self.record(f"interrupted: {error}".rstrip(": "))
        elif isinstance(error, BlockLLMError):
            self.record(f"error: {error}")
        elif isinstance(error, Exception) and not isinstance(error, BrokenPipeError):
            self.record("".join(traceback.format_exception(error)).rstrip())
            if self._log is not None:
                _put(self._warnings, f"the lines below are in {self._log.path} as well")


def _put(console: Console, line: str) -> None:
    """Print `line` as it is: as a `Text`, nothing in it is taken for markup, an emoji or a number to colour."""
    console.print(Text(printable(line)), soft_wrap=True)
