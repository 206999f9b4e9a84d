"""Starting: help, and the first update of a run whose data are there."""

from __future__ import annotations

import sys

from speed.cases import OURS, Case, Contestant, Section
from speed.sections import simple

FIRST = "first update of quickstart"
BLOCKLLM = [sys.executable, "-m", "blockllm_cli"]
SETS = (
    "schedule.steps=1",
    "schedule.warmup=0",
    "evaluate.at_start=false",
    "evaluate.tokens=256",
    "tracking.log_every=1",
)


def cases() -> list[Case]:
    """Commands beside the import that no run can do without."""
    run = [*BLOCKLLM, "pretrain", "quickstart", "--output", "{place}"]
    commands: dict[str, tuple[list[str], str | None]] = {
        "blockllm --help": ([*BLOCKLLM, "--help"], None),
        "import torch": ([sys.executable, "-c", "import torch"], None),
        FIRST: ([*run, *(part for each in SETS for part in ("--set", each))], "update 1/1"),
    }
    contestants = tuple(
        Contestant(label, OURS, "command", {"command": command, "first": first})
        for label, (command, first) in commands.items()
    )
    return [Case("start-up", contestants, weight=0.5, warm_up=1, rounds=(3, 7))]


SECTION = Section("startup", "start-up", simple.page("import torch"), cases)
