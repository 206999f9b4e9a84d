"""Evaluation: forward passes over fixed rows."""

from __future__ import annotations

from speed.cases import OURS, Case, Contestant, Section
from speed.models import shape_of
from speed.sections import simple

ROWS, LENGTH = 8, 256


def cases() -> list[Case]:
    """60m in both precisions."""
    return [_case(precision) for precision in ("fp32", "bf16")]


def _case(precision: str) -> Case:
    spec = {"shape": shape_of("60m"), "rows": ROWS, "length": LENGTH, "precision": precision, "evaluate": True}
    contestants = (
        Contestant("ours", OURS, "ours_evaluation", spec),
        Contestant("plain torch", "torch", "plain", spec),
        Contestant("plain torch, compiled", "torch", "plain", {**spec, "compile": True}),
        Contestant("transformers", "transformers", "llama", spec),
    )
    return Case(f"60m, {ROWS} x {LENGTH}, {precision}", contestants, ROWS * LENGTH, "tokens", 0.3, rounds=(3, 20))


SECTION = Section("evaluation", "evaluation of fixed rows", simple.page("ours", "tokens"), cases)
