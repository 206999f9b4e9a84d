"""Sections that are scripts with a way of measuring of their own: their lines are kept as they are printed."""

from __future__ import annotations

from speed.cases import Choice, Section
from speed.figures import Clock
from speed.results import SectionResult


def page(result: SectionResult, clock: Clock = "wall") -> str:
    """What the script printed."""
    if result.reason:
        return result.reason
    return "\n".join(["```", *result.lines, "```"])


def _data(choice: Choice) -> list[str] | None:
    return None if choice.data is None else ["data.py", "--data", choice.data]


SKETCH = Section("sketch", "the sketch of a gradient", page, script=lambda _: ["sketch.py"], weight=0.5)
DATA = Section("data", "the data pipeline; DATA names shards of real text", page, script=_data, weight=2.0)
TRACKING = Section(
    "tracking",
    "what following a run in W&B costs it",
    page,
    script=lambda _: ["tracking.py", "--minutes", "0.5"],
    weight=1.0,
)
