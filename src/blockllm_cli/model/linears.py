"""Linear layers that can hand the gradient of their weight to others, row by row, instead of leaving it to autograd.

The usual way of taking a weight's gradient is a hook that fires when autograd has made it. A layer whose `feeds` are
set makes it itself in the backward pass, and only the rows that are wanted: a tenth of the rows costs a tenth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from blockllm_cli.model.autograd import applied
from blockllm_cli.model.products import has_own_product, product

Wanted = slice | Tensor
"""Rows of a matrix: contiguous ones, or their numbers (int64, ascending)."""


class Feed(Protocol):
    """What takes rows of a weight's gradient."""

    def wanted_rows(self) -> Wanted | None:
        """Which rows; None: all of them."""

    def accept_rows(self, rows: Tensor) -> None:
        """Take these rows of the gradient of one backward pass; the tensor is the feed's from here on."""


class SelfFeeding(nn.Module):
    """A module that can hand the gradient of its weight to feeds.

    Attributes:
        weight: its one parameter.
        feeds: set for the length of a pass, they get the gradient of the weight, which autograd then does not make; the
            weight has to require a gradient. Empty: autograd does.
        feeds_all: whether it is to feed whatever is wanted, since nothing else can while it is compiled.
        feeds_rows: whether it can make some rows of the gradient alone, and so feeds where no more is wanted.
    """

    weight: Tensor
    feeds: tuple[Feed, ...] = ()
    feeds_all: bool = False
    feeds_rows: bool = False


class Linear(SelfFeeding, nn.Linear):
    """x W^T without bias."""

    feeds_rows = True

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to the last dimension of `input`."""
        if self.feeds or has_own_product(input):
            multiplied: Tensor = applied(_Linear, input, self.weight, self.feeds)
            return multiplied
        return F.linear(input, self.weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, feeds: Sequence[Feed]) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.feeds = feeds
        return times(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        # The weight is done with before a feed sees its gradient: the feed may write it.
        x_gradient = None if weight is None else times(gradient, weight)
        if x is None:
            return x_gradient, None, None
        if ctx.feeds:
            hand_over(gradient, x, ctx.feeds)
            return x_gradient, None, None
        return x_gradient, product(gradient.flatten(0, -2).t(), x.flatten(0, -2)), None


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """`x` (..., m) times `matrix` (m, n): (..., n)."""
    return product(x.flatten(0, -2), matrix).view(*x.shape[:-1], matrix.shape[1])


class _FedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, feeds: Sequence[Feed]) -> Tensor:
        ctx.feeds = feeds
        return weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        for feed in ctx.feeds:
            feed.accept_rows(gradient)
        return None, None


def fed(weight: Tensor, feeds: Sequence[Feed]) -> Tensor:
    """`weight`, for one use of it, whose gradient goes to `feeds`, which take all of it; `weight` itself without."""
    if not feeds:
        return weight
    used: Tensor = applied(_FedWeight, weight, feeds)
    return used


def hand_over(gradient: Tensor, x: Tensor, feeds: Sequence[Feed]) -> None:
    """Make the products that `feeds` want of a weight's gradient, and hand each its own.

    Args:
        gradient: of the layer's output, (..., out).
        x: the layer's input, (..., in).
        feeds: of the weight (out, in).
    """
    columns, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
    for feed in feeds:
        feed.accept_rows(product(pick_columns(columns, feed.wanted_rows()).t(), inputs))


def pick_columns(matrix: Tensor, wanted: Wanted | None) -> Tensor:
    """The wanted columns of `matrix`; a view where they are contiguous, all if None."""
    if wanted is None:
        return matrix
    return matrix[:, wanted] if isinstance(wanted, slice) else matrix.index_select(1, wanted)
