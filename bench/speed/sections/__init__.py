"""The sections of the bench, in the order in which they run."""

from __future__ import annotations

from speed.cases import Section
from speed.sections import blockllm, checkpoint, dense, evaluation, growth, loss, scripts, startup, update

SECTIONS: dict[str, Section] = {
    each.name: each
    for each in (
        dense.SECTION,
        blockllm.SECTION,
        update.SECTION,
        loss.SECTION,
        evaluation.SECTION,
        growth.SECTION,
        checkpoint.SECTION,
        startup.SECTION,
        scripts.SKETCH,
        scripts.DATA,
        scripts.TRACKING,
    )
}
