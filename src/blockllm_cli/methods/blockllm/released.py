"""What the released class of BlockLLM decides: which tensors train, which one is watched, when it selects anew.

Source: class `BlockLLM` of RAmruthaVignesh/blockllm, commit 4a629f4. It differs from the paper in nearly every rule:
blocks are tensors and are trained whole, embedding and head never train, the first update changes nothing, the visit
frequency hardly weighs in the score (it is normalised and divided by the update's number as well), the tensor that
reaches the budget is left out, and a new selection needs newest losses above the mean of all since the last one. Where
the release would be left without any tensor to train, and fail, the first one is taken.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any


@dataclass
class Released:
    """Selection state of the released class. Names are parameter names, `sizes` in the model's order.

    Attributes:
        sizes: elements of each eligible tensor.
        sparsity: share of elements that do not train.
        update_freq: a selection can only come at multiples of this many updates.
        patience: losses averaged.
        probe: tensors watched beside the selected ones.
        probe_every: updates after which others are watched.
        seed: of all draws, each keyed by (seed, what, update).
        selected: names that train, in the order in which they were taken.
        watched: names whose gradient norm is looked at although they do not train.
        norms: latest known gradient norms.
        visits: visit frequencies, which sum to 1.
        losses: since the last selection.
    """

    sizes: Mapping[str, int]
    sparsity: float
    update_freq: int
    patience: int
    probe: int
    probe_every: int
    seed: int
    selected: list[str] = field(default_factory=list)
    watched: list[str] = field(default_factory=list)
    norms: dict[str, float] = field(default_factory=dict)
    visits: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    @property
    def limit(self) -> int:
        """Elements that a selection stays below; embedding and head do not count in."""
        return int((1 - self.sparsity) * sum(self.sizes.values()))

    @property
    def first_count(self) -> int:
        """Tensors of the start."""
        return max(1, int((1 - self.sparsity) * len(self.sizes)))

    def begin(self) -> None:
        """The start: that share of the *tensors*, not of their elements, drawn at random."""
        self.visits = dict.fromkeys(self.sizes, 1.0 / len(self.sizes))
        self.selected = self._shuffled(list(self.sizes), "begin", 0)[: self.first_count]

    def after_update(self, step: int, norms: Mapping[str, float], loss: float) -> bool:
        """Take note of an update that was carried out; returns whether another selection was made.

        Args:
            step: its number, from 2: the first update of the release returns before anything happens.
            norms: gradient norms of what trained and of what was watched.
            loss: of the update.
        """
        self.losses.append(loss)
        self.norms.update(norms)
        if step % self.probe_every == 0:
            resting = [name for name in self.sizes if name not in self.selected]
            self.watched = self._shuffled(resting, "probe", step)[: self.probe]
        if not self._is_due(step):
            return False
        self._select(step)
        return True

    def _is_due(self, step: int) -> bool:
        if step % self.update_freq or len(self.losses) <= self.patience:
            return False
        newest = self.losses[-self.patience :]
        return sum(self.losses) / len(self.losses) < sum(newest) / len(newest)

    def _select(self, step: int) -> None:
        score = {name: norm / exp(self.visits[name] / step) for name, norm in self.norms.items()}
        ranked = sorted(score, key=lambda name: score[name], reverse=True)
        self.selected, size = [], 0
        unknown = self._shuffled([name for name in self.sizes if name not in self.norms], "fill", step)
        # What was never measured comes last and in any order. The tensor that reaches the limit is left out, and its
        # size still counts, so that nothing smaller follows it.
        for name in [*ranked, *unknown]:
            size += self.sizes[name]
            if size >= self.limit:
                break
            self.selected.append(name)
        self.selected = self.selected or [*ranked, *unknown][:1]
        self._count_visits()
        self.watched = []
        self.losses = []

    def _count_visits(self) -> None:
        """Add one to each selected tensor in the model's order, and make the sum 1 again after each."""
        for name in self.sizes:
            if name in self.selected:
                self.visits[name] += 1.0
                total = sum(self.visits.values())
                self.visits = {other: visit / total for other, visit in self.visits.items()}

    def _shuffled(self, names: Sequence[str], what: str, step: int) -> list[str]:
        digest = hashlib.blake2b(f"{self.seed}/{what}/{step}".encode(), digest_size=8).digest()
        return random.Random(int.from_bytes(digest, "little")).sample(list(names), len(names))

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values."""
        return {
            "selected": self.selected,
            "watched": self.watched,
            "norms": self.norms,
            "visits": self.visits,
            "losses": self.losses,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self.selected, self.watched = list(saved["selected"]), list(saved["watched"])
        self.norms, self.visits = dict(saved["norms"]), dict(saved["visits"])
        self.losses = list(saved["losses"])
