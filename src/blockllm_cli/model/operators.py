"""The parts of a compiled layer that the compiler sees from outside only: matrix products and blocked attention.

A compiled graph is a fixed list of operators, while what becomes of a weight's gradient changes with every selection.
So the products are operators of our own whose backward pass looks up, when it runs, who takes the gradient of which
weight, and makes no product that nobody takes. Nothing of that is visible to the compiler, and no change of it makes
the compiler start again.

An operator's arguments are tensors and numbers. What a layer wants to be done is therefore a tensor, its *orders*:
int64 (2,) on the CPU, the number of a `Taker`, and bits that say of which parts the input's gradient is wanted.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from blockllm_cli.model.attention import blocked_attention, blocked_attention_backward
from blockllm_cli.model.linears import times


class Part(IntEnum):
    """The operators of a layer, in the order of the forward pass; bit `part` of a layer's orders is of its input."""

    QUERY_KEY_VALUE = 0
    ATTENTION = 1
    OUTPUT = 2
    GATE_UP = 3
    DOWN = 4


class Taker(Protocol):
    """What takes the gradients of a layer's matrices."""

    def take(self, part: int, gradients: Sequence[Tensor], x: Tensor) -> None:
        """Take the two factors of the gradients of the matrices of `part`.

        Args:
            part: which (`Part`).
            gradients: of the outputs, each (B, L, out).
            x: the input that they share, (B, L, in).
        """


# The only way from a number back to an object. Weak: a number that nobody holds any more means nothing.
_takers: weakref.WeakValueDictionary[int, Taker] = weakref.WeakValueDictionary()


def register_taker(taker: Taker) -> int:
    """A number for `taker` to stand in a layer's orders, for as long as it lives."""
    _takers[id(taker)] = taker
    return id(taker)


@torch.library.custom_op("blockllm::project", mutates_args=())
def project(x: Tensor, weights: list[Tensor], orders: Tensor, part: int, feeds: bool) -> list[Tensor]:
    """The product x W^T for each of `weights`.

    Args:
        x: (B, L, in).
        weights: each (out, in); no gradient comes back for them.
        orders: see the module.
        part: which matrices these are (`Part`).
        feeds: whether the gradients of `weights` may be wanted; if not, `x` is not kept for the backward pass.
    """
    return [times(x, weight.t()) for weight in weights]


@project.register_fake
def _(x: Tensor, weights: list[Tensor], orders: Tensor, part: int, feeds: bool) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


@torch.library.custom_op("blockllm::project_backward", mutates_args=())
def _project_backward(
    gradients: list[Tensor], x: Tensor | None, weights: list[Tensor], orders: Tensor, part: int
) -> Tensor:
    number, wanted = orders.tolist()
    if wanted >> part & 1:
        x_gradient = times(gradients[0], weights[0])
        for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
            x_gradient += times(gradient, weight)
    else:
        x_gradient = gradients[0].new_zeros(*gradients[0].shape[:-1], weights[0].shape[1])
    # The weights are done with before a route sees a gradient: the route may write them.
    if x is not None:
        _takers[number].take(part, gradients, x)
    return x_gradient


@_project_backward.register_fake
def _(gradients: list[Tensor], x: Tensor | None, weights: list[Tensor], orders: Tensor, part: int) -> Tensor:
    return gradients[0].new_empty(*gradients[0].shape[:-1], weights[0].shape[1])


def _save_projection(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, orders, ctx.part, feeds = inputs
    ctx.save_for_backward(x if feeds else None, orders, *weights)


def _differentiate_projection(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    x, orders, *weights = ctx.saved_tensors
    x_gradient = _project_backward(gradients, x, weights, orders, ctx.part)
    return x_gradient, [None] * len(weights), None, None, None


project.register_autograd(_differentiate_projection, setup_context=_save_projection)


@torch.library.custom_op("blockllm::attend", mutates_args=())
def attend_blocked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, orders: Tensor) -> Tensor:
    """`blocked_attention`, whose backward pass makes nothing if nothing is wanted of it.

    Args:
        query: as there.
        key: as there.
        value: as there.
        mask: as there.
        orders: see the module.
    """
    return blocked_attention(query, key, value, mask)


@attend_blocked.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, orders: Tensor) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("blockllm::attend_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, orders: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if orders.tolist()[1] >> Part.ATTENTION & 1:
        return blocked_attention_backward(gradient, query, key, value, mask)
    return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)


@_attend_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, orders: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, mask, orders = inputs
    ctx.save_for_backward(query, key, value, orders, mask)


def _differentiate_attention(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    query, key, value, orders, mask = ctx.saved_tensors
    return *_attend_backward(gradient, query, key, value, mask, orders), None, None


attend_blocked.register_autograd(_differentiate_attention, setup_context=_save_attention)
