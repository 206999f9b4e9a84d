"""What the second BlockLLM calls a block, and how it cuts parameters into blocks; see `blockllm_reference`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """Rows [first, last) of a parameter; `sliced` if they are not all of it."""

    name: str
    first: int
    last: int
    sliced: bool

    @property
    def key(self) -> str:
        return f"{self.name}@{self.first}:{self.last}" if self.sliced else self.name


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
            parts = tuple(Part(name, 0, weights[name].shape[0], False) for name in names)
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
        part = Part(name, rows * i // count, rows * (i + 1) // count, sliced=count > 1)
        blocks.append(Block(part.key, (part,), (part.last - part.first) * width))
    return blocks
