"""The table that most sections have: contestants with their spread, how much work that is, and a ratio to one."""

from __future__ import annotations

from collections.abc import Callable

from speed.figures import Clock
from speed.markdown import SPREAD_HEADS, joined, measured, missing, spread_cells, table
from speed.results import CaseResult, SectionResult


def page(reference: str, unit: str = "") -> Callable[[SectionResult, Clock], str]:
    """Makes tables with ratios of medians to `reference`; with a unit, also with work a second in millions of it."""

    def made(result: SectionResult, clock: Clock = "wall") -> str:
        return joined(*(_page_of(name, case, clock) for name, case in result.cases.items()))

    def _page_of(name: str, case: CaseResult, clock: Clock) -> str:
        found = measured(case, clock)
        rows = []
        for label, (outcome, seconds) in found.items():
            cells = [label, *spread_cells(seconds)]
            work = case.work or float(outcome.facts.get(unit, 0))
            if unit:
                cells.append(
                    f"{work / seconds.median:,.0f}" if unit == "tokens" else f"{work / seconds.median / 1e9:.2f}"
                )
            ratio = f"{seconds.median / found[reference][1].median:.2f}" if reference in found else ""
            rows.append([*cells, ratio])
        shown = {"": [], "tokens": ["tokens/s"], "bytes": ["GB/s"]}[unit]
        return joined(table([name, *SPREAD_HEADS, *shown, f"to {reference}"], rows), *missing(case))

    return made
