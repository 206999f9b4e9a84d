"""Dense training with AdamW: the package beside what else one would train with, each in its own precisions."""

from __future__ import annotations

from collections.abc import Iterable

from speed.cases import OURS, Case, Contestant, Section
from speed.figures import Clock, fastest_peer, medians
from speed.markdown import SPREAD_HEADS, joined, measured, missing, spread_cells, table
from speed.models import shape_of
from speed.results import CaseResult, SectionResult

GRID = ((4, 256), (4, 1024), (16, 256))
"""Rows and positions of a batch, which is one pass."""

OUR_VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "ours, fp32": ("fp32", {"precision": "fp32"}),
    "ours, bf16": ("bf16", {"precision": "bf16"}),
    "ours, bf16 with bf16 state": ("bf16", {"precision": "bf16_papers"}),
}
"""Label -> kind, and what of the spec differs. The peers' pure bf16 has state in bf16, as torch's AdamW makes it."""

OUR_VARIANTS |= {
    f"{label}, compiled": (kind, {**different, "compile": True}) for label, (kind, different) in OUR_VARIANTS.items()
}

LOOPS = {
    "plain torch": ("torch", "plain"),
    "transformers": ("transformers", "llama"),
    "transformers Trainer": ("transformers", "llama_trainer"),
    "litgpt": ("litgpt", "lit"),
}
PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "autocast": "bf16"}
"""Precision of a peer -> kind that it is compared within: `autocast` has fp32 weights and bf16 products."""

Variant = tuple[str, str, bool]
"""A loop, its precision, and whether it is compiled."""

FAST: tuple[Variant, ...] = (
    ("plain torch", "fp32", True),
    ("plain torch", "bf16", True),
    ("transformers", "bf16", False),
    ("transformers", "bf16", True),
    ("litgpt", "bf16", True),
)
"""What runs at every batch."""

FIELD: tuple[Variant, ...] = (
    *FAST,
    ("plain torch", "bf16", False),
    ("transformers", "fp32", False),
    ("transformers Trainer", "bf16", True),
    ("litgpt", "fp32", True),
)
"""What runs at the first batch of `GRID`, where an update takes the least time."""

NOTE = (
    "Ratios are of medians. All train on the same random rows, a batch in one pass, with fused AdamW without weight "
    "decay and without clipping; only litgpt's loop cannot be asked not to clip. Of a peer, bf16 means weights and "
    "state in bf16, autocast both in fp32; ours has bf16 weights and, where the label says nothing else, fp32 state. "
    "Ours keeps freed memory in the process, as its command does; a peer has what the C library does by itself."
)


def cases() -> list[Case]:
    """Each size with each batch; with --all also every way of running each loop, a case a loop, as memory allows."""
    grid = [_on_grid(size, rows, length) for size in ("60m", "9m") for rows, length in GRID]
    return grid + [_every_way(size, loop) for size in ("60m", "9m") for loop in LOOPS]


def _on_grid(size: str, rows: int, length: int) -> Case:
    is_default = size == "60m" or rows == GRID[0][0]
    variants = FIELD if (rows, length) == GRID[0] else FAST
    weight = 3.0 if size == "60m" and rows * length > 2000 else 1.5 if size == "60m" else 0.7
    return _case(f"{size}, {rows} x {length}", size, (rows, length), variants, weight, is_default=is_default)


def _every_way(size: str, loop: str) -> Case:
    variants = [(loop, precision, is_compiled) for precision in PRECISIONS for is_compiled in (False, True)]
    rows, length = GRID[0]
    name = f"{size}, {rows} x {length}, every way of {loop}"
    return _case(name, size, GRID[0], variants, 1.0, is_default=False)


def _case(
    name: str, size: str, batch: tuple[int, int], variants: Iterable[Variant], weight: float, *, is_default: bool
) -> Case:
    rows, length = batch
    spec = {"shape": shape_of(size), "rows": rows, "length": length}
    ours = tuple(
        Contestant(label, OURS, "ours", {**spec, "method": "adamw", **different}, kind, is_default)
        for label, (kind, different) in OUR_VARIANTS.items()
    )
    peers = tuple(
        Contestant(
            f"{loop}, {precision}{', compiled' if is_compiled else ''}",
            LOOPS[loop][0],
            LOOPS[loop][1],
            {**spec, "precision": precision, "compile": is_compiled},
            PRECISIONS[precision],
            is_default,
        )
        for loop, precision, is_compiled in variants
    )
    return Case(name, ours + peers, rows * length, "tokens", weight)


def page(result: SectionResult, clock: Clock = "wall") -> str:
    """Ratios first, then every contestant."""
    details = (_details(name, case, clock) for name, case in result.cases.items())
    return joined(_ratios(result, clock), NOTE, *details)


def _ratios(result: SectionResult, clock: Clock) -> str:
    rows = []
    for name, case in result.cases.items():
        for kind in ("fp32", "bf16", None):
            peer = fastest_peer(case, OURS, kind, clock)
            found = medians(case, clock)
            ours = [
                label
                for label in found
                if case.outcomes[label].peer == OURS and kind in (None, case.outcomes[label].kind)
            ]
            if peer is None or not ours:
                continue
            best = min(ours, key=found.__getitem__)
            speeds = [f"{case.work / found[label]:,.0f}" for label in (best, peer)]
            ratio = found[peer] / found[best]
            rows.append([name, kind or "each at its best", best, speeds[0], peer, speeds[1], f"{ratio:.2f}"])
    heads = ["model, rows x positions", "precision", "ours", "tokens/s", "fastest peer", "tokens/s", "ours / peer"]
    return table(heads, rows) if rows else ""


def _details(name: str, case: CaseResult, clock: Clock) -> str:
    best = {kind: fastest_peer(case, OURS, kind, clock) for kind in ("fp32", "bf16")}
    found = measured(case, clock)
    rows = []
    for label, (outcome, seconds) in sorted(found.items(), key=lambda item: item[1][1].median):
        peer = best.get(outcome.kind)
        ratio = f"{found[peer][1].median / seconds.median:.2f}" if peer else ""
        rows.append([label, f"{case.work / seconds.median:,.0f}", *spread_cells(seconds), ratio])
    heads = [name, "tokens/s", *SPREAD_HEADS, "to the fastest peer of its precision"]
    return joined(table(heads, rows), *missing(case))


SECTION = Section("dense", "dense training with AdamW, beside other loops", page, cases)
