"""How the time of a dense update grows with width, length and depth: slopes of log time over log size."""

from __future__ import annotations

from collections.abc import Mapping

from speed.cases import OURS, Case, Contestant, Section
from speed.figures import Clock, slope
from speed.markdown import SPREAD_HEADS, joined, measured, missing, spread_cells, table
from speed.results import CaseResult, SectionResult

BASE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 1024,
}
ROWS, LENGTH, PRECISION = 4, 256, "bf16"
VALUES: Mapping[str, tuple[int, ...]] = {
    "width": (128, 256, 512, 1024),
    "length": (128, 256, 512, 1024),
    "blocks": (2, 4, 8, 16),
}


def cases() -> list[Case]:
    """One for each dimension; heads stay 64 wide, and the vocabulary is small so that the layers are what grows."""
    return [
        Case(
            f"{dimension}",
            tuple(Contestant(str(value), OURS, "ours", _spec(dimension, value)) for value in values),
            weight=0.3,
            rounds=(3, 30),
        )
        for dimension, values in VALUES.items()
    ]


def _spec(dimension: str, value: int) -> dict[str, object]:
    shape, length = dict(BASE), LENGTH
    if dimension == "width":
        shape |= {
            "hidden_size": value,
            "intermediate_size": value * BASE["intermediate_size"] // BASE["hidden_size"],
            "num_attention_heads": value // 64,
        }
    elif dimension == "blocks":
        shape["num_hidden_layers"] = value
    else:
        length = value
    return {"shape": shape, "rows": ROWS, "length": length, "precision": PRECISION, "method": "adamw"}


def page(result: SectionResult, clock: Clock = "wall") -> str:
    """A table for each dimension."""
    return joined(*(_page_of(name, case, clock) for name, case in result.cases.items()))


def _page_of(name: str, case: CaseResult, clock: Clock) -> str:
    found = {int(label): seconds for label, (_, seconds) in measured(case, clock).items()}
    values = sorted(found)
    rows, before = [], None
    for value in values:
        local = ""
        if before is not None:
            local = f"{slope({before: found[before].median, value: found[value].median}):.2f}"
        rows.append([str(value), *spread_cells(found[value]), local])
        before = value
    overall = ""
    if len(values) > 1:
        overall = f"Slope over all: {slope({value: found[value].median for value in values}):.2f}."
    return joined(table([name, *SPREAD_HEADS, "slope from the row before"], rows), overall, *missing(case))


SECTION = Section("growth", "growth of an update with width, length and blocks", page, cases)
