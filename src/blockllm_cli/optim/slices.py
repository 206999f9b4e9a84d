"""What a rule is applied to, and how it is cut: into parts of bounded size, several small ones together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blockllm_cli.optim.entries import Chunk, Entries
from blockllm_cli.optim.scratch import Scratch


class Stored(NamedTuple):
    """What a rule works on for one name; the tensors are 1-D, of one length and device, where nothing else is said.

    Attributes:
        name: names the draws of stochastic rounding.
        weight: written. If `entries` is not None, the whole piece in its shape, contiguous.
        gradient: may be overwritten.
        slots: state, one tensor for each of the rule's slots; written.
        master: fp32 copy of the weight, which is what the rule works on then; written.
        entries: which entries of `weight` the others belong to; None for all.
    """

    name: str
    weight: Tensor
    gradient: Tensor
    slots: tuple[Tensor, ...]
    master: Tensor | None
    entries: Entries | None = None

    def is_all_of(self, dtype: torch.dtype) -> bool:
        """Whether all tensors are of `dtype` and the weight is whole, so that a rule can run on them themselves."""
        tensors = (self.weight, self.gradient, *self.slots)
        return self.entries is None and all(tensor.dtype == dtype for tensor in tensors)

    def cut(self, entries: int) -> Iterator[Part]:
        """Consecutive parts of about `entries`; at multiples of 64, so that vector units do not see the cuts."""
        if self.entries is None and self.gradient.numel() <= entries:
            yield self.whole()
        elif self.entries is None:
            for start in range(0, self.gradient.numel(), entries):
                stop = min(start + entries, self.gradient.numel())
                yield self._part(self.weight[start:stop], start, stop)
        else:
            for chunk in self.entries.chunks(entries):
                yield self._part(self.weight, chunk.start, chunk.start + chunk.size, chunk)

    def whole(self) -> Part:
        """All of it as one part."""
        assert self.entries is None
        return Part(self.name, 0, self.weight, self.gradient, self.slots, self.master)

    def _part(self, weight: Tensor, start: int, stop: int, chunk: Chunk | None = None) -> Part:
        if stop - start == self.gradient.numel():
            return Part(self.name, 0, weight, self.gradient, self.slots, self.master, chunk)
        slots = tuple(slot[start:stop] for slot in self.slots)
        master = None if self.master is None else self.master[start:stop]
        return Part(self.name, start, weight, self.gradient[start:stop], slots, master, chunk)


class Part(NamedTuple):
    """Consecutive entries of one `Stored`, as views.

    Attributes:
        start: number of the first entry.
        chunk: which entries of `weight`, then the whole piece, these are; None for all.
    """

    name: str
    start: int
    weight: Tensor
    gradient: Tensor
    slots: tuple[Tensor, ...]
    master: Tensor | None
    chunk: Chunk | None = None

    @property
    def size(self) -> int:
        """Entries."""
        return self.gradient.numel()

    def weights(self, scratch: Scratch, use: str) -> Tensor:
        """The weights, 1-D: a view, or a copy in `scratch` if they lie apart."""
        if self.chunk is None:
            return self.weight
        gathered = scratch.take(use, self.size, self.weight.dtype)
        self.chunk.gather(self.weight, gathered)
        return gathered

    def copy_weights(self, scratch: Scratch, use: str) -> Tensor:
        """The weights, 1-D, a copy in `scratch`."""
        weights = self.weights(scratch, use)
        return weights if self.chunk is not None else scratch.take(use, self.size, weights.dtype).copy_(weights)


def groups(stored: Sequence[Stored], entries: int) -> Iterator[list[Part]]:
    """The parts of `stored` in order, so many at a time that they have at most `entries`, or one that has more."""
    group: list[Part] = []
    size = 0
    for each in stored:
        for part in each.cut(entries):
            if group and size + part.size > entries:
                yield group
                group, size = [], 0
            group.append(part)
            size += part.size
    if group:
        yield group
