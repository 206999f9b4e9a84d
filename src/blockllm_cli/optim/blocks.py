"""Pieces of parameters, and the blocks of pieces that compete for a budget of entries with state."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal

from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """A whole parameter tensor, or contiguous rows of one. An entry of a 1-D tensor is a row.

    Attributes:
        parameter: name of the tensor.
        shape: of the piece itself.
        rows: first row and the one after the last; None for the whole tensor.
    """

    parameter: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        """`<parameter>`, or `<parameter>@<first row>:<row after the last>`."""
        return self.parameter if self.rows is None else f"{self.parameter}@{self.rows[0]}:{self.rows[1]}"

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of `tensor` (the parameter, or anything in its shape), a view."""
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


@dataclass(frozen=True)
class Block:
    """What is selected or not as a whole.

    Attributes:
        name: of its tensor or slice, of its decoder layer, or the expression that gathers it.
        pieces: in the model's order.
    """

    name: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Elements of all pieces."""
        return sum(piece.size for piece in self.pieces)


def cut_blocks(
    shapes: Shapes,
    *,
    budget: int,
    granularity: Literal["tensor", "layer"] = "tensor",
    groups: Sequence[str] = (),
    layer_of: Callable[[str], int | None],
) -> list[Block]:
    """Divide the tensors of `shapes` into blocks, in their order, each at most `budget` elements where rows allow it.

    A layer or group that is larger is cut into its tensors, a tensor into equal row slices.

    Args:
        shapes: name -> shape of the candidates.
        budget: elements.
        granularity: a block is a tensor, or all tensors of a decoder layer.
        groups: expressions; a tensor belongs to the first that finds it in its name, the rest are blocks themselves.
        layer_of: decoder layer of a name, or None.

    Raises:
        ValueError: an expression finds no tensor.
    """
    members: dict[str, list[str]] = {}
    for name in shapes:
        members.setdefault(_owner(name, granularity, groups, layer_of), []).append(name)
    for index, pattern in enumerate(groups):
        if pattern not in members or pattern in groups[:index]:
            raise ValueError(f"{pattern!r} finds no candidate that an expression before it does not")
    blocks = [block for owner, names in members.items() for block in _fitted(owner, names, shapes, budget)]
    order = {name: index for index, name in enumerate(shapes)}
    # Stable, so that slices of one tensor stay in row order.
    return sorted(blocks, key=lambda block: order[block.pieces[0].parameter])


def _owner(name: str, granularity: str, groups: Sequence[str], layer_of: Callable[[str], int | None]) -> str:
    for pattern in groups:
        if re.search(pattern, name):
            return pattern
    layer = layer_of(name) if granularity == "layer" else None
    return name if layer is None else name[: name.index(f".{layer}.")] + f".{layer}"


def _fitted(owner: str, names: Sequence[str], shapes: Shapes, budget: int) -> Iterator[Block]:
    pieces = tuple(Piece(name, tuple(shapes[name])) for name in names)
    whole = Block(owner, pieces)
    if whole.size <= budget:
        yield whole
        return
    for piece in pieces:
        for part in _slices(piece, budget):
            yield Block(part.key, (part,))


def _slices(piece: Piece, budget: int) -> list[Piece]:
    """Equal row slices, as few as keep each within `budget`; single rows if even those are larger."""
    if piece.size <= budget:
        return [piece]
    rows, rest = piece.shape[0], piece.shape[1:]
    per_slice = max(1, budget // prod(rest))
    count = -(-rows // per_slice)
    bounds = [rows * index // count for index in range(count + 1)]
    return [Piece(piece.parameter, (stop - start, *rest), (start, stop)) for start, stop in pairwise(bounds)]
