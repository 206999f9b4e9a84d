"""What a person sees of a run: a live display on a terminal, whole lines elsewhere, and the same lines in log.txt.

Off a terminal nothing is redrawn: one plain line per logged update, no escape codes, no carriage returns.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from blockllm_cli import metrics
from blockllm_cli.units import format_bytes, format_count, format_seconds


class _LastingConsole(Console):
    """A console whose reader may go away: training goes on, and log.txt has what is no longer printed."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # Python flushes stdout once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Terminal:
    """Prints to stdout and, once a run folder exists, to its log.

    Args:
        console: where to print; by default stdout as it is.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _LastingConsole(highlight=False, soft_wrap=True)
        self._log: TextIO | None = None
        self._early: list[str] = []
        self._live: _LiveRun | None = None

    def log_to(self, log: TextIO) -> None:
        """Write what was said so far, and all that will be, to `log`."""
        self._log = log
        log.write("".join(line + "\n" for line in self._early))
        log.flush()
        self._early.clear()

    def close(self) -> None:
        """Leave the live display and the log."""
        self.stop_live()
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def say(self, line: str) -> None:
        """One line for the person and for the log."""
        self.record(line)
        self.console.print(line, markup=False)

    def record(self, line: str) -> None:
        """One line for the log alone."""
        if self._log is None:
            self._early.append(line)
        else:
            self._log.write(line + "\n")
            self._log.flush()

    @contextmanager
    def working(self, description: str) -> Iterator[None]:
        """A long step of unknown length: said before, and how long it took after."""
        started = time.perf_counter()
        self.record(f"{description} ...")
        if self.console.is_terminal:
            with self.console.status(description):
                yield
        else:
            self.console.print(f"{description} ...", markup=False)
            yield
        self.say(f"{description}: {format_seconds(time.perf_counter() - started)}")

    def start_live(self, *, steps: int, done: int) -> None:
        """Begin the display of the training loop."""
        self._live = _LiveRun(self.console, steps, done)

    def stop_live(self) -> None:
        """End the display of the training loop; what it last showed stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def advance(self, step: int) -> None:
        """An update is done."""
        if self._live is not None:
            self._live.advance(step)

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics: a line in the log; on a terminal the live display, else the same line."""
        left = self._live.seconds_left(row) if self._live is not None else None
        line = _line(row, self._live.steps if self._live is not None else row[metrics.STEP], left)
        self.record(line)
        if self._live is not None and self.console.is_terminal:
            self._live.show(row, left)
            if metrics.PERPLEXITY in row:
                self.console.print(line, markup=False)
        else:
            self.console.print(line, markup=False)

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """A table of two columns; plain aligned lines off a terminal and in the log."""
        width = max(len(name) for name, _ in rows)
        lines = [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
        for line in lines:
            self.record(line)
        if self.console.is_terminal:
            table = Table(title=title, show_header=False, title_justify="left")
            for name, value in rows:
                table.add_row(name, value)
            self.console.print(table)
        else:
            for line in lines:
                self.console.print(line, markup=False)


class _LiveRun:
    """Progress of the loop, the time left, and on a terminal a bar with the newest figures, which fit 80 columns."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self.steps = steps
        self._first = done
        self._started = time.perf_counter()
        self._perplexity = ""
        self._below = Text()
        self._progress = Progress(
            BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.fields[figures]}", markup=False)
        )
        self._task = self._progress.add_task("training", total=steps, completed=done, figures="")
        self._live: Live | None = None
        if console.is_terminal:
            shown = Group(self._progress, self._below)
            self._live = Live(shown, console=console, transient=True, refresh_per_second=4)
            self._live.start()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def seconds_left(self, row: Mapping[str, Any]) -> float | None:
        done: int = row[metrics.STEP] - self._first
        if done <= 0:
            return None
        to_do: int = self.steps - row[metrics.STEP]
        return (time.perf_counter() - self._started) / done * to_do

    def show(self, row: Mapping[str, Any], left: float | None) -> None:
        self._perplexity = _figure(row, metrics.PERPLEXITY, "perplexity {:.2f}") or self._perplexity
        figures = [_figure(row, metrics.LOSS, "loss {:.3f}"), self._perplexity]
        figures += [f"{format_seconds(left)} left"] if left is not None else []
        self._progress.update(self._task, figures=_joined(figures))
        speed = [_figure(row, metrics.TOKENS_PER_SECOND, "{:,.0f} tokens/s")]
        speed += [f"rss {format_bytes(row['memory/rss_bytes'])}"] if "memory/rss_bytes" in row else []
        memory = [
            f"{name} {format_bytes(row[key])}"
            for name, key in (
                ("weights", "memory/weights_bytes"),
                ("master", "memory/master_weights_bytes"),
                ("gradients", "memory/gradients_bytes"),
                ("state", "memory/optimizer_state_bytes"),
            )
            if row.get(key)
        ]
        self._below.plain = f"{_joined(speed)}\n{_joined(memory)}"

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()


def _joined(parts: Sequence[str]) -> str:
    return " · ".join(part for part in parts if part)


def _figure(row: Mapping[str, Any], key: str, form: str) -> str:
    return form.format(row[key]) if row.get(key) is not None else ""


def _line(row: Mapping[str, Any], steps: int, left: float | None) -> str:
    parts = [
        f"update {row[metrics.STEP]}/{steps}",
        f"{format_count(row[metrics.TOKENS])} tokens",
        _figure(row, metrics.LOSS, "loss {:.4f}"),
        _figure(row, metrics.GRADIENT_NORM, "norm {:.3f}"),
        _figure(row, metrics.LEARNING_RATE, "rate {:.2e}"),
        _figure(row, metrics.PERPLEXITY, "perplexity {:.2f}"),
        _figure(row, metrics.UNIGRAM_PERPLEXITY, "(unigram {:.1f})"),
        _figure(row, metrics.TOKENS_PER_SECOND, "{:,.0f} tokens/s"),
        f"{format_seconds(left)} left" if left is not None else "",
        f"rss {format_bytes(row['memory/rss_bytes'])}" if "memory/rss_bytes" in row else "",
    ]
    return "  ".join(part for part in parts if part)
