"""The update alone, against the bandwidth of a copy.

Whole blocks are adamw on all of 60m. For gathered entries the model has a small vocabulary, so that what is always
trained whole does not cover what is meant, and enough updates are made before that every selected block has its mask.
The bytes of an update are the least that it has to move, an index included, but not the whole cache lines that
scattered entries touch. A copy fetches the lines that it overwrites, which its bytes do not count; a sum in place,
like an update, writes only what it has read.
"""

from __future__ import annotations

from typing import Any

from speed.cases import OURS, Case, Contestant, Section
from speed.figures import Clock, Spread
from speed.markdown import SPREAD_HEADS, joined, measured, missing, spread_cells, table
from speed.models import parameter_shapes, shape_of
from speed.results import CaseResult, Outcome, SectionResult

COPY, SUM = "copy of memory", "sum in place"
SHAPE = shape_of("60m")
FEW_PIECES = 512
AHEAD = 10
"""Updates until the masks of all selected blocks are there."""

GATHERED: dict[str, dict[str, Any]] = {
    "whole tensors, s 0.9": {"sparsity": 0.9},
    "entries, s 0.9, density 0.2": {"sparsity": 0.9, "mask": "entry", "density": 0.2},
    "rows, s 0.9, density 0.2": {"sparsity": 0.9, "mask": "row", "density": 0.2},
}


def cases() -> list[Case]:
    """Whole parameters beside the peers, then parts of them."""
    return [_whole(), _gathered()]


def _memory() -> tuple[Contestant, ...]:
    names = {COPY: "copy", SUM: "sum"}
    return tuple(Contestant(label, "torch", "optimizers", {"optimizer": name}) for label, name in names.items())


def _ours(label: str, precision: str, method: str, options: dict[str, Any], vocab_size: int, ahead: int) -> Contestant:
    # One row of a few tokens makes the gradients; only the update is timed.
    spec = {
        "shape": shape_of("60m", vocab_size),
        "rows": 1,
        "length": 8,
        "precision": precision,
        "method": method,
        "options": options,
        "time": "update",
        "ahead": ahead,
    }
    return Contestant(label, OURS, "ours", spec)


def _whole() -> Case:
    spec = {"shapes": parameter_shapes(SHAPE)}
    peers = (
        ("torch fused, fp32", "torch", "fused", "fp32"),
        ("torch foreach, fp32", "torch", "foreach", "fp32"),
        ("torch fused, bf16", "torch", "fused", "bf16"),
        ("torch foreach, bf16", "torch", "foreach", "bf16"),
        ("torchao AdamW8bit, fp32", "torchao", "adamw8bit", "fp32"),
        ("torchao AdamW8bit, bf16", "torchao", "adamw8bit", "bf16"),
        ("galore-torch, fp32", "galore", "galore", "fp32"),
        ("galore-torch layerwise, fp32", "galore", "galore, layerwise", "fp32"),
    )
    contestants = (
        *_memory(),
        *(
            _ours(f"ours adamw, {precision}", precision, "adamw", {}, SHAPE["vocab_size"], 0)
            for precision in ("fp32", "bf16", "bf16_papers", "bf16_master")
        ),
        *(
            Contestant(label, peer, "optimizers", {**spec, "optimizer": name, "precision": precision})
            for label, peer, name, precision in peers
        ),
    )
    return Case("whole parameters of 60m", contestants, weight=1.0, rounds=(5, 30))


def _gathered() -> Case:
    contestants = (
        *_memory(),
        *(
            _ours(f"{label}, {precision}", precision, "blockllm", {"patience": 10**5, **options}, FEW_PIECES, AHEAD)
            for label, options in GATHERED.items()
            for precision in ("fp32", "bf16")
        ),
    )
    return Case("parts of the matrices of 60m, 512 pieces", contestants, weight=0.5, rounds=(5, 30))


def page(result: SectionResult, clock: Clock = "wall") -> str:
    """Seconds, entries and the share of a copy's bandwidth."""
    return joined(*(_page_of(name, case, clock) for name, case in result.cases.items()))


def _page_of(name: str, case: CaseResult, clock: Clock) -> str:
    found = measured(case, clock)
    ceilings = [_rate("bytes", *found[label]) if label in found else None for label in (COPY, SUM)]
    rows = []
    for label, (outcome, seconds) in found.items():
        entries, moved = _rate("entries", outcome, seconds), _rate("bytes", outcome, seconds)
        rows.append(
            [
                label,
                *spread_cells(seconds),
                f"{entries / 1e6:,.0f}" if entries else "",
                f"{moved / 1e9:.1f}" if moved else "",
                *(f"{moved / ceiling:.0%}" if moved and ceiling else "" for ceiling in ceilings),
            ]
        )
    heads = [name, *SPREAD_HEADS, "million entries/s", "GB/s", "of the copy", "of the sum"]
    return joined(table(heads, rows), *missing(case))


def _rate(what: str, outcome: Outcome, seconds: Spread) -> float | None:
    """How much of `what` a second of the median repeat does; None if the worker did not say how much a repeat is."""
    amount = outcome.repeats[-1].get(what, outcome.facts.get(what))
    return None if amount is None else float(amount) / seconds.median


SECTION = Section("update", "the update alone, against copy bandwidth", page, cases)
