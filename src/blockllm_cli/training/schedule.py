"""The learning rate as a pure function of the update's number, relative to its peak."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleShape = Literal["cosine", "linear", "constant", "wsd", "papers"]

DECAY_SHARE = 0.2
"""Share of all updates in which `wsd` decays (Hägele et al. 2024, arXiv 2405.18392: 10 to 20 % match cosine)."""

# What the trainer shared by the GaLore family of papers multiplies the rate by where a cycle begins anew.
_RESTART = 1e-7


@dataclass(frozen=True)
class Schedule:
    """Factor of the peak rate at each update: a linear warm-up, then a shape.

    Update t <= warmup has t / warmup, so that the first update moves something and update `warmup` has the peak. After
    it, with p the share of the remaining updates done (1 at the last one):

    - `cosine`: half a cosine from 1 to `min_ratio`;
    - `linear`: a straight line from 1 to `min_ratio`;
    - `constant`: 1;
    - `wsd` (warm-up, stable, decay): 1, then 1 - (1 - min_ratio) * sqrt(q) over the last 20 % of all updates, q being
      the share of those (arXiv 2405.18392); it begins with the end of the warm-up if that is later;
    - `papers`: what the trainer behind GaLore, ReLoRA and their kin really does: a cosine with warm-up read one update
      late, so that the first update has factor 0 and the last one of `steps` lies just above `min_ratio`. Its own loop
      makes one update more, with a factor of 1e-7 (1 without warm-up), which `factor(steps + 1)` gives.

    Cosine and linear have exactly `min_ratio` at the last update. Without warm-up they start just below the peak.

    Attributes:
        shape: one of the words above.
        steps: updates of the run, at least 1.
        warmup: updates of the warm-up, 0 to `steps`.
        min_ratio: factor at the end, in [0, 1]; `constant` does not read it.
    """

    shape: ScheduleShape
    steps: int
    warmup: int = 0
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.warmup <= self.steps or not 0.0 <= self.min_ratio <= 1.0:
            raise ValueError(f"a schedule needs steps >= 1, 0 <= warmup <= steps, 0 <= min_ratio <= 1, not {self}")

    def factor(self, step: int) -> float:
        """Factor of the peak rate at update `step`, from 1 to `steps`."""
        if self.shape == "papers":
            return self._papers(step - 1)
        if step <= self.warmup:
            return step / self.warmup
        progress = (step - self.warmup) / (self.steps - self.warmup)
        if self.shape == "cosine":
            return self._between(0.5 * (1.0 + math.cos(math.pi * progress)))
        if self.shape == "linear":
            return self._between(1.0 - progress)
        if self.shape == "wsd":
            start = max(self.warmup, self.steps - max(1, round(DECAY_SHARE * self.steps)))
            return 1.0 if step <= start else self._between(1.0 - math.sqrt((step - start) / (self.steps - start)))
        return 1.0

    def _between(self, share: float) -> float:
        return self.min_ratio + (1.0 - self.min_ratio) * share

    def _papers(self, done: int) -> float:
        """The multiplier after `done` calls of that trainer's scheduler; it runs in cycles of `steps`."""
        position = done % self.steps
        if position < self.warmup:
            return _RESTART if position < 2 and done >= self.steps else position / self.warmup
        progress = (position - self.warmup) / max(1, self.steps - self.warmup)
        return self._between(0.5 * (1.0 + math.cos(math.pi * progress)))
