"""Saving and loading everything that a run of 60m resumes from."""

from __future__ import annotations

from speed.cases import OURS, Case, Contestant, Section
from speed.figures import Clock
from speed.markdown import joined
from speed.models import shape_of
from speed.results import SectionResult
from speed.sections import simple


def cases() -> list[Case]:
    """Writing and reading, each beside torch's own."""
    spec = {"shape": shape_of("60m"), "precision": "fp32", "method": "adamw"}
    return [
        Case(
            f"60m with AdamW state, fp32: {word}",
            tuple(
                Contestant(what, OURS, "ours_checkpoint", {**spec, "what": what}) for what in (word, f"torch.{word}")
            ),
            unit="bytes",
            weight=0.15,
            warm_up=1,
            rounds=(3, 7),
        )
        for word in ("save", "load")
    ]


def _page(result: SectionResult, clock: Clock = "wall") -> str:
    parts = []
    for name, case in result.cases.items():
        one = result.model_copy(update={"cases": {name: case}})
        word = name.rpartition(": ")[2]
        parts.append(simple.page(f"torch.{word}", "bytes")(one, clock))
    return joined(*parts)


SECTION = Section("checkpoint", "saving and loading a checkpoint", _page, cases)
