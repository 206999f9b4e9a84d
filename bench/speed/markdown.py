"""Pieces of Markdown that tables are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from speed.figures import Clock, Spread, spread
from speed.results import CaseResult, Outcome


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are text."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds(seconds: float) -> str:
    """Three significant figures, in ms."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def spread_cells(found: Spread) -> list[str]:
    """Median, fastest, middle half and count: four cells."""
    half = f"{milliseconds(found.lower)} to {milliseconds(found.upper)}"
    return [milliseconds(found.median), milliseconds(found.least), half, str(found.count)]


SPREAD_HEADS = ["median ms", "fastest", "middle half", "repeats"]


def measured(case: CaseResult, clock: Clock) -> dict[str, tuple[Outcome, Spread]]:
    """Label -> outcome and spread of what was measured."""
    return {
        label: (outcome, spread(outcome, clock))
        for label, outcome in case.outcomes.items()
        if outcome.state == "measured" and outcome.repeats
    }


def missing(case: CaseResult) -> list[str]:
    """A line for each contestant that has no figure, with the reason."""
    return [
        f"{label}: {outcome.state}, {outcome.reason or 'no repeat'}"
        for label, outcome in case.outcomes.items()
        if outcome.state != "measured" or not outcome.repeats
    ]


def joined(*parts: str) -> str:
    """Paragraphs, those that are empty left out."""
    return "\n\n".join(part for part in parts if part)
