"""How far a long piece of work has come, in words: for a line in a log, and for a display that is redrawn.

Nothing here prints and nothing reads a clock; `terminal.py` does both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from blockllm_cli import metrics
from blockllm_cli.units import format_bytes, format_count, format_seconds

FIRST_LINE_SECONDS = 10.0
"""A step that is over sooner leaves no line of its progress."""
SILENCE_SECONDS = 60.0
"""Without a terminal something is said at least this often, however long an update or a step takes."""


class Activity(Protocol):
    """Work that is going on."""

    def words(self, now: float) -> str:
        """One plain line that says how far it is."""

    def patience(self, now: float) -> float:
        """Seconds without a line after which `words` are due."""

    def share(self) -> float | None:
        """Part of it that is done, from 0 to 1, if that is known."""

    def figures(self, now: float) -> list[list[str]]:
        """For the display: lines of short parts, the most important first, since a narrow terminal drops the last."""


class Step:
    """One long step, as `Terminal.progress` gives it; whoever works calls `advance` or `update` as often as it likes.

    Args:
        description: what is done, such as `tokenising the validation set`.
        total: how much there is to do; None where nobody knows.
        unit: of `total`, in the plural; `bytes` are shown as KiB, MiB and GiB; empty where only time is known.
        started: when it began, seconds of the clock that `now` is read from.
    """

    def __init__(self, description: str, total: float | None, unit: str, started: float) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = 0.0
        self._started = started

    def advance(self, amount: float = 1) -> None:
        """`amount` more is done."""
        self.done += amount

    def update(self, done: float, total: float | None = None) -> None:
        """`done` in all is done, of `total` where that is known by now; fits as the callback of the lower layers."""
        self.done = done
        if total is not None:
            self.total = total

    def seconds(self, now: float) -> float:
        """How long it has taken so far."""
        return now - self._started

    def share(self) -> float | None:
        """Part of it that is done, from 0 to 1, if that is known."""
        return min(1.0, self.done / self.total) if self.total else None

    def patience(self, now: float) -> float:
        """Ten seconds at first; rarer as it takes longer, so that a day's work is no longer log than an hour's."""
        return min(SILENCE_SECONDS, max(FIRST_LINE_SECONDS, self.seconds(now) / 30))

    def words(self, now: float) -> str:
        """One plain line, such as `evaluating: 120/640 rows, 19 %, 40 s left`."""
        return f"{self.description}: {', '.join(self._parts(now))}"

    def conclusion(self, now: float) -> str:
        """The line that closes it: how much was done in which time."""
        return f"{self.description}: {f'{self._amount(self.done)} in ' if self.unit else ''}{self._time(now)}"

    def interruption(self, now: float) -> str:
        """The line that closes it where it did not come to its end."""
        reached = [self._amount(self.done)] if self.unit else []
        return f"{self.description}: not finished ({', '.join([*reached, self._time(now)])})"

    def figures(self, now: float) -> list[list[str]]:
        """The same in parts."""
        return [[self.description, *self._parts(now)]]

    def _parts(self, now: float) -> list[str]:
        share = self.share()
        reached = self._amount(self.done) if self.unit else ""
        if share is None or self.total is None:
            return [part for part in (reached, f"{self._time(now)} so far") if part]
        reached = f"{self._amount(self.done, bare=True)}/{self._amount(self.total)}"
        left = self.seconds(now) * (1 / share - 1) if share > 0 else None
        return [reached, f"{share:.0%}".replace("%", " %"), *([f"{format_seconds(left)} left"] if left else [])]

    def _amount(self, count: float, *, bare: bool = False) -> str:
        if self.unit == "bytes":
            return format_bytes(count)
        return f"{count:,.0f}" if bare else f"{count:,.0f} {self.unit}".rstrip()

    def _time(self, now: float) -> str:
        return format_seconds(self.seconds(now))


@dataclass
class Training:
    """The training loop.

    Attributes:
        steps: updates of the whole run.
        step: updates done.
        started: when this process began with them.
        first: updates done by then.
        row: newest figures, of several rows.
    """

    steps: int
    step: int
    started: float
    first: int = field(init=False)
    row: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first = self.step

    def seconds_left(self, now: float) -> float | None:
        """Time to the last update at the mean speed so far; None before the first update of this process."""
        done = self.step - self.first
        return (now - self.started) / done * (self.steps - self.step) if done > 0 else None

    def share(self) -> float | None:
        """Part of the updates that are done."""
        return self.step / self.steps

    def patience(self, now: float) -> float:
        """Rows speak for themselves; only long updates, or rows that are logged rarely, need a word in between."""
        return SILENCE_SECONDS

    def words(self, now: float) -> str:
        """One plain line for the time between two rows."""
        left = self.seconds_left(now)
        parts = [f"{self.step}/{self.steps} updates done", f"{format_seconds(now - self.started)} so far"]
        return "training: " + ", ".join([*parts, *([f"{format_seconds(left)} left"] if left else [])])

    def line(self, row: Mapping[str, Any], now: float) -> str:
        """The plain line of a row of metrics."""
        left = self.seconds_left(now)
        return row_line(row, self.steps, [f"{format_seconds(left)} left"] if left is not None else [])

    def figures(self, now: float) -> list[list[str]]:
        """Progress and what it came to; speed and memory; which memory."""
        row, left = self.row, self.seconds_left(now)
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
        lines = [
            [
                f"{self.step}/{self.steps}",
                _figure(row, metrics.LOSS, "loss {:.3f}"),
                _figure(row, metrics.PERPLEXITY, "perplexity {:.2f}"),
                f"{format_seconds(left)} left" if left is not None else "",
            ],
            [_figure(row, metrics.TOKENS_PER_SECOND, "{:,.0f} tokens/s"), _resident(row)],
            memory,
        ]
        return [parts for line in lines if (parts := [part for part in line if part])]


def row_line(row: Mapping[str, Any], steps: int, more: Sequence[str] = ()) -> str:
    """A row of metrics as one plain line, `more` after its speed."""
    parts = [
        f"update {row[metrics.STEP]}/{steps}",
        f"{format_count(row[metrics.TOKENS])} tokens",
        _figure(row, metrics.LOSS, "loss {:.4f}"),
        _figure(row, metrics.GRADIENT_NORM, "norm {:.3f}"),
        _figure(row, metrics.LEARNING_RATE, "rate {:.2e}"),
        _figure(row, metrics.PERPLEXITY, "perplexity {:.2f}"),
        _figure(row, metrics.UNIGRAM_PERPLEXITY, "(unigram {:.1f})"),
        _figure(row, metrics.TOKENS_PER_SECOND, "{:,.0f} tokens/s"),
        *more,
        _resident(row),
    ]
    return "  ".join(part for part in parts if part)


def _resident(row: Mapping[str, Any]) -> str:
    return f"rss {format_bytes(row['memory/rss_bytes'])}" if "memory/rss_bytes" in row else ""


def _figure(row: Mapping[str, Any], key: str, form: str) -> str:
    return form.format(row[key]) if row.get(key) is not None else ""
