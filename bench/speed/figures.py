"""Figures from repeats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from speed.results import CaseResult, Outcome

Clock = Literal["wall", "cpu"]


@dataclass(frozen=True)
class Spread:
    """Seconds of the repeats of one contestant.

    Attributes:
        least: the fastest.
        lower: first quartile.
        median: of all.
        upper: third quartile.
        most: the slowest.
        count: repeats.
    """

    least: float
    lower: float
    median: float
    upper: float
    most: float
    count: int


def spread(outcome: Outcome, clock: Clock = "wall") -> Spread:
    """The spread of an outcome that was measured."""
    values = [repeat[clock] for repeat in outcome.repeats]
    if len(values) == 1:
        only = values[0]
        return Spread(only, only, only, only, only, 1)
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(min(values), lower, statistics.median(values), upper, max(values), len(values))


def medians(case: CaseResult, clock: Clock = "wall") -> dict[str, float]:
    """Label -> median seconds, of those that were measured."""
    return {
        label: spread(outcome, clock).median
        for label, outcome in case.outcomes.items()
        if outcome.state == "measured" and outcome.repeats
    }


def fastest_peer(case: CaseResult, ours: str, kind: str | None = None, clock: Clock = "wall") -> str | None:
    """The label with the least median among those that do not run in `ours`; None if none was measured.

    Args:
        case: all outcomes.
        ours: environment that is no peer.
        kind: only contestants of this kind; None takes all.
        clock: which seconds.
    """
    found = {
        label: seconds
        for label, seconds in medians(case, clock).items()
        if case.outcomes[label].peer != ours and kind in (None, case.outcomes[label].kind)
    }
    return min(found, key=found.__getitem__, default=None)


def slope(points: Mapping[float, float]) -> float:
    """Least-squares slope of log y over log x: the exponent of a power law.

    Raises:
        ValueError: fewer than two points.
    """
    if len(points) < 2:
        raise ValueError("a slope needs two points")
    return _linear([math.log(x) for x in points], [math.log(y) for y in points.values()])


def _linear(xs: Sequence[float], ys: Sequence[float]) -> float:
    return statistics.linear_regression(xs, ys).slope
