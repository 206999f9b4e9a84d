"""State of entries of one piece, whatever update each started at: what is sorted out when a selection changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockllm_cli.optim.entries import positions_within


@dataclass
class Pool:
    """Units of one piece with their state, by ascending position.

    Attributes:
        width: entries of a unit: those of a row where whole rows have state, else 1.
        units: numbers of rows or positions of entries, int64 (n,), or int32 where the pool is stored.
        counters: updates that each took part in, int32 (n,).
        values: state by name, and the master copy if there is one; each (n, width).
    """

    width: int
    units: Tensor
    counters: Tensor
    values: dict[str, Tensor]

    @classmethod
    def merged(cls, pools: Sequence[Pool], device: torch.device) -> Pool:
        """The disjoint `pools`, at least one, as one on `device`; by entry if their units differ."""
        if len({pool.width for pool in pools}) > 1:
            pools = [pool.by_entry() for pool in pools]
        units, order = torch.sort(torch.cat([pool.units.to(device).long() for pool in pools]))
        counters = torch.cat([pool.counters.to(device) for pool in pools])[order]
        values = {name: torch.cat([pool.values[name].to(device) for pool in pools])[order] for name in pools[0].values}
        return cls(pools[0].width, units, counters, values)

    def by_entry(self) -> Pool:
        """The same with single entries as units; values are views."""
        if self.width == 1:
            return self
        within = torch.arange(self.width, device=self.units.device)
        return Pool(
            width=1,
            units=(self.units.long().unsqueeze(1) * self.width + within).view(-1),
            counters=self.counters.repeat_interleave(self.width),
            values={name: value.view(-1, 1) for name, value in self.values.items()},
        )

    def among(self, units: Tensor) -> Tensor:
        """Which of the pool's units are among `units` (int64, ascending), bool (n,)."""
        return positions_within(self.units, units.to(self.units.device))

    def part(self, chosen: Tensor) -> Pool:
        """The units where `chosen` (bool) holds, copies."""
        values = {name: value[chosen] for name, value in self.values.items()}
        return Pool(self.width, self.units[chosen], self.counters[chosen], values)

    def by_counter(self) -> Mapping[int, Pool]:
        """Parts of equal counter."""
        return {counter: self.part(self.counters == counter) for counter in torch.unique(self.counters).tolist()}
