"""What is measured, as plain data: contestants that take turns in a case, cases that make a section."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speed.figures import Clock
    from speed.results import SectionResult

OURS = "ours"
"""The environment that the driver itself runs in; all others are made by `bench/setup_peers.py`."""


@dataclass(frozen=True)
class Contestant:
    """One thing that is timed.

    Attributes:
        label: names it in its case, in the results and in tables.
        peer: environment that it runs in.
        worker: module under `speed.workers`.
        spec: what the worker is told, plain JSON values.
        kind: what it is compared within, such as a precision.
        is_default: whether it runs without `--all`.
    """

    label: str
    peer: str
    worker: str
    spec: Mapping[str, Any]
    kind: str = ""
    is_default: bool = True


@dataclass(frozen=True)
class Case:
    """Contestants whose repeats alternate.

    Attributes:
        name: names it in its section.
        contestants: in the order of their turns.
        work: what one repeat does, in `unit`; 0 where the worker says it.
        unit: "tokens", "bytes" or "" where only seconds count.
        weight: its part of the time, relative to other cases.
        warm_up: repeats of each that are not counted.
        rounds: fewest and most counted repeats of each.
    """

    name: str
    contestants: tuple[Contestant, ...]
    work: float = 0.0
    unit: str = ""
    weight: float = 1.0
    warm_up: int = 2
    rounds: tuple[int, int] = (3, 40)


@dataclass(frozen=True)
class Choice:
    """What the command line asks for.

    Attributes:
        everything: also contestants that are no default.
        data: folder with C4-shaped shards, or None.
    """

    everything: bool = False
    data: str | None = None


@dataclass(frozen=True)
class Section:
    """Cases with one table.

    Attributes:
        name: what `--only` and the page's markers call it.
        title: one line on what it is.
        table: Markdown from its results, with seconds of one clock.
        cases: to be run in turn.
        script: in place of cases, a script of `bench/` and its arguments; what it prints is kept.
        weight: minutes that a script is reckoned with.
    """

    name: str
    title: str
    table: Callable[[SectionResult, Clock], str]
    cases: Callable[[], list[Case]] = field(default=list)
    script: Callable[[Choice], list[str] | None] | None = None
    weight: float = 0.0
