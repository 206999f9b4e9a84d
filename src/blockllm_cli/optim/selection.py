"""Which blocks train next: scores, visits, the budget, the order, and when to choose again.

Everything here is plain values and asks nothing of a device but the norms, which are read in one transfer. Asking
changes nothing; what an update has brought is put in by methods whose names say so.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

Cause = Literal["first", "patience", "max_interval"]

_MOST_UNREAD = 100
"""Updates whose norms may stay on the device, so that a run that never selects does not gather them without end."""


def exact(value: float) -> Fraction:
    """The decimal number that was written: 0.9 is nine tenths."""
    return Fraction(str(value))


def budget(candidates: int, sparsity: float) -> int:
    """Entries that may have state: floor((1 - sparsity) candidates), without the rounding of binary fractions."""
    return math.floor((1 - exact(sparsity)) * candidates)


class Norms:
    """The latest known gradient norm of every block, and the update it is from.

    Norms come in as scalars on the device and are read when they are asked for. One that is not finite leaves the value
    before it.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._steps: dict[str, int] = {}
        self._unread: list[tuple[list[str], Tensor, int]] = []

    def note(self, norms: Mapping[str, Tensor], step: int) -> None:
        """Take the norms (scalars, any float dtypes, one device) of blocks at update `step`."""
        if norms:
            self._unread.append((list(norms), torch.stack(list(norms.values())), step))
        if len(self._unread) >= _MOST_UNREAD:
            self.read()

    def put(self, norms: Mapping[str, float], step: int) -> None:
        """Take norms of blocks at update `step` that the host knows already."""
        self.read()
        self._settle(norms, step)

    def read(self) -> dict[str, float]:
        """Norm by block, for those that have one."""
        if self._unread:
            values = iter(torch.cat([norms for _, norms, _ in self._unread]).tolist())
            for names, _, step in self._unread:
                self._settle({name: next(values) for name in names}, step)
            self._unread.clear()
        return dict(self._values)

    def _settle(self, norms: Mapping[str, float], step: int) -> None:
        for name, norm in norms.items():
            if math.isfinite(norm):
                self._values[name], self._steps[name] = norm, step

    def step_of(self, name: str) -> int | None:
        """Update at which the norm of a block was taken, or None."""
        self.read()
        return self._steps.get(name)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"values": self.read(), "steps": dict(self._steps)}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self._values, self._steps = dict(saved["values"]), dict(saved["steps"])
        self._unread.clear()


@dataclass
class Visits:
    """How often each block was selected.

    Attributes:
        selections: made so far.
        times: block -> selections it was part of.
    """

    selections: int = 0
    times: dict[str, int] = field(default_factory=dict)

    def frequency(self, name: str) -> float:
        """(1 + times selected) / (1 + selections so far), in (0, 1]."""
        return (1 + self.times.get(name, 0)) / (1 + self.selections)

    def count(self, names: Iterable[str]) -> None:
        """A selection of these blocks was made."""
        self.selections += 1
        for name in names:
            self.times[name] = self.times.get(name, 0) + 1


@dataclass
class Patience:
    """When to select anew: the losses since the last selection.

    Attributes:
        window: losses that are averaged.
        min_interval: fewest updates before a selection by patience.
        max_interval: updates after which a selection comes in any case; 0 is never.
        updates: carried out since the last selection.
        newest: the last `window` losses.
    """

    window: int
    min_interval: int = 0
    max_interval: int = 0
    updates: int = 0
    newest: deque[float] = field(default_factory=deque)

    def cause(self) -> Cause | None:
        """Why a selection is due, or None."""
        is_full = len(self.newest) == self.window and self.updates >= self.min_interval
        if is_full and self.newest[-1] >= math.fsum(self.newest) / self.window:
            return "patience"
        return "max_interval" if 0 < self.max_interval <= self.updates else None

    def note(self, loss: float) -> None:
        """An update was carried out."""
        self.updates += 1
        self.newest.append(loss)
        while len(self.newest) > self.window:
            self.newest.popleft()

    def clear(self) -> None:
        """A selection was made."""
        self.updates = 0
        self.newest.clear()

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"updates": self.updates, "newest": list(self.newest)}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self.updates, self.newest = saved["updates"], deque(saved["newest"])


def by_falling(scores: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """`names` by falling score, ties in their given order; those without a score come last."""
    return sorted(names, key=lambda name: -scores.get(name, -math.inf))


def at_random(names: Sequence[str], seed: int, number: int) -> list[str]:
    """`names` in an order that depends on (seed, number of the selection) alone."""
    digest = hashlib.blake2b(f"{seed}/selection/{number}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little")).sample(list(names), len(names))


def starting_at(names: Sequence[str], first: str | None) -> list[str]:
    """`names` in their order, from `first` on and round to it; None starts at the beginning."""
    start = 0 if first is None else names.index(first)
    return [*names[start:], *names[:start]]


def in_turn(names: Sequence[str], after: str | None) -> list[str]:
    """`names` in their order, from the one behind `after` on and round to it."""
    start = 0 if after is None else names.index(after) + 1
    return [*names[start:], *names[:start]]


def take_whole(order: Sequence[str], sizes: Mapping[str, int], limit: int) -> list[str]:
    """Walk `order` and take each block that fits into what is left of `limit` entries."""
    taken, left = [], limit
    for name in order:
        if sizes[name] <= left:
            taken.append(name)
            left -= sizes[name]
    return taken


def take_masked(
    order: Sequence[str],
    sizes: Mapping[str, int],
    limit: int,
    density: float,
    kept: Callable[[str, Fraction], int],
) -> tuple[list[str], Fraction]:
    """Walk `order` and take blocks until size x density sums to `limit`, the crossing one included.

    Blocks of which nothing would be kept even alone are passed over.

    Args:
        order: blocks.
        sizes: elements of each.
        limit: entries to be kept of all together at most.
        density: largest share of a block that is kept.
        kept: (block, share) -> entries that are kept of it, floor(share x size) or less.

    Returns:
        The blocks of which something is kept, and the common share z = min(density, limit / sum of the sizes taken).
    """
    most = exact(density)
    walked: list[str] = []
    total = 0
    for name in order:
        if total * most >= limit:
            break
        if kept(name, min(most, Fraction(limit, sizes[name]))) > 0:
            walked.append(name)
            total += sizes[name]
    while walked:
        share = min(most, Fraction(limit, total))
        if taken := [name for name in walked if kept(name, share) > 0]:
            return taken, share
        # Spread over all of these the budget is less than a row of each: the last one goes.
        total -= sizes[walked.pop()]
    return [], most


def wave(waiting: Sequence[str], sizes: Mapping[str, int], limit: int) -> list[str]:
    """The first blocks of `waiting` whose sizes sum to `limit` at most, and at least one."""
    taken, total = list(waiting[:1]), sizes[waiting[0]] if waiting else 0
    for name in waiting[1:]:
        total += sizes[name]
        if total > limit:
            break
        taken.append(name)
    return taken


def next_in_round(names: Sequence[str], after: str | None, count: int, is_open: Callable[[str], bool]) -> list[str]:
    """The next `count` blocks for which `is_open` holds, from the one behind `after` on, round and once each."""
    return [name for name in in_turn(names, after) if is_open(name)][:count]
