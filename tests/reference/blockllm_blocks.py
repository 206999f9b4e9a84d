"""What the second BlockLLM calls a block, how it cuts parameters into blocks, and how a budget is spent on them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """Rows [first, last) of a parameter, of `width` entries each; `sliced` if they are not all of it."""

    name: str
    first: int
    last: int
    width: int
    sliced: bool

    @property
    def key(self) -> str:
        return f"{self.name}@{self.first}:{self.last}" if self.sliced else self.name

    def keeps(self, share: Fraction, mask: str) -> int:
        """How many entries (mask "row": rows) are kept of it."""
        return math.floor(share * (self.last - self.first) * (1 if mask == "row" else self.width))


class Block(NamedTuple):
    name: str
    parts: tuple[Part, ...]
    size: int


def role(name: str) -> str:
    if "embed_tokens" in name:
        return "embedding"
    if "lm_head" in name:
        return "head"
    return "norm" if "norm" in name else "body"


def layer(name: str) -> int | None:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def cut(weights: Mapping[str, Tensor], budget: int, granularity: str, groups: Sequence[str]) -> list[Block]:
    """Blocks of at most `budget` entries, in the order of the parameters."""
    members: dict[str, list[str]] = {}
    for name in weights:
        fitting = [pattern for pattern in groups if re.search(pattern, name)]
        if fitting:
            owner = fitting[0]
        elif granularity == "layer" and layer(name) is not None:
            owner = f"model.layers.{layer(name)}"
        else:
            owner = name
        members.setdefault(owner, []).append(name)
    blocks = []
    for owner, names in members.items():
        size = sum(weights[name].numel() for name in names)
        if size <= budget:
            parts = tuple(
                Part(name, 0, weights[name].shape[0], weights[name][0].numel(), sliced=False) for name in names
            )
            blocks.append(Block(owner, parts, size))
            continue
        for name in names:
            blocks.extend(cut_tensor(name, weights[name], budget))
    order = list(weights)
    return sorted(blocks, key=lambda block: (order.index(block.parts[0].name), block.parts[0].first))


def cut_tensor(name: str, weight: Tensor, budget: int) -> list[Block]:
    rows, width = weight.shape[0], weight[0].numel()
    count = next(k for k in range(1, rows + 1) if math.ceil(rows / k) * width <= budget)
    blocks = []
    for i in range(count):
        part = Part(name, rows * i // count, rows * (i + 1) // count, width, sliced=count > 1)
        blocks.append(Block(part.key, (part,), (part.last - part.first) * width))
    return blocks


def take(walk: Sequence[Block], budget: int, mask: str, density: Fraction) -> tuple[list[Block], Fraction]:
    """The blocks taken off `walk`, and the share of each that is kept."""
    taken: list[Block] = []
    if mask == "none":
        for block in walk:
            if sum(other.size for other in taken) + block.size <= budget:
                taken.append(block)
        return taken, Fraction(1)
    for block in walk:
        taken.append(block)
        if sum(other.size for other in taken) * density >= budget:
            break
    share = min(density, Fraction(budget, sum(block.size for block in taken)))
    return [block for block in taken if any(part.keeps(share, mask) for part in block.parts)], share


def entries_kept(block: Block, share: Fraction, mask: str) -> int:
    return sum(part.keeps(share, mask) * (part.width if mask == "row" else 1) for part in block.parts)


def wave(waiting: Sequence[Block], limit: int) -> list[Block]:
    """The first blocks of `waiting`: as many as have no more than `limit` entries together, one at least."""
    entering: list[Block] = []
    for block in waiting:
        if entering and sum(other.size for other in entering) + block.size > limit:
            break
        entering.append(block)
    return entering


def updates_of_entering(step: int, taken: Sequence[Block], share: Fraction, limit: int) -> list[int]:
    """From which update on each block trains, if no other selection comes before."""
    if share == 1:
        return [step] * len(taken)
    updates: list[int] = []
    while len(updates) < len(taken):
        updates += [step] * len(wave(taken[len(updates) :], limit))
        step += 1
    return updates
