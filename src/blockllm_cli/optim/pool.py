"""State of entries of one piece, whatever update each started at: what is sorted out when a selection changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from blockllm_cli.optim.entries import positions_within


@dataclass
class Pool:
    """Units (entries, or rows where rows are kept) of one piece with their state, by ascending position.

    Attributes:
        units: positions of entries or numbers of rows, int64 (n,), or int32 where the pool is stored.
        counters: updates that each took part in, int32 (n,).
        values: state by name, and the master copy if there is one; each (n, entries of a unit).
    """

    units: Tensor
    counters: Tensor
    values: dict[str, Tensor]

    @classmethod
    def merged(cls, pools: Iterable[Pool], device: torch.device) -> Pool | None:
        """The disjoint `pools` as one on `device`; None if there are none."""
        pools = list(pools)
        if not pools:
            return None
        units, order = torch.sort(torch.cat([pool.units.to(device).long() for pool in pools]))
        counters = torch.cat([pool.counters.to(device) for pool in pools])[order]
        values = {name: torch.cat([pool.values[name].to(device) for pool in pools])[order] for name in pools[0].values}
        return cls(units, counters, values)

    def among(self, units: Tensor) -> Tensor:
        """Which of the pool's units are among `units` (int64, ascending), bool (n,)."""
        return positions_within(self.units, units.to(self.units.device))

    def part(self, chosen: Tensor) -> Pool:
        """The units where `chosen` (bool) holds, copies."""
        return Pool(
            self.units[chosen], self.counters[chosen], {name: value[chosen] for name, value in self.values.items()}
        )

    def by_counter(self) -> Mapping[int, Pool]:
        """Parts of equal counter."""
        return {counter: self.part(self.counters == counter) for counter in torch.unique(self.counters).tolist()}
