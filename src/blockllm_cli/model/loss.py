"""Negative log likelihood of target tokens straight from hidden states and head, without the logits of a whole batch.

Only the logits of one chunk of tokens exist at a time. In training the gradients of hidden states and head are made
in the forward pass, while a chunk's logits are at hand, so that nothing of size tokens x vocabulary outlives its chunk
and no product is done twice. The log-sum-exp is taken in fp32 whatever the dtype of the product.

Letters: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import e, log2
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blockllm_cli.model.autograd import applied
from blockllm_cli.model.head_sum import HeadSum, add_chunk, cached_rows
from blockllm_cli.model.linears import Feed, Wanted
from blockllm_cli.model.products import product, takes_out

CHUNK_BYTES = 64 * 2**20
"""Aim for the logits of one chunk, in bytes of the product's dtype; `bench/loss.py` has the measurements."""


LOG2_E = log2(e)


def chunk_tokens(vocab_size: int, element_bytes: int) -> int:
    """Tokens per chunk, so that logits of `vocab_size` columns stay within `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (vocab_size * element_bytes))


def chunked_nll(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    scale: float,
    chunk: int | None = None,
    feeds: Sequence[Feed] = (),
) -> tuple[Tensor, Tensor]:
    """Scaled sum of the negative log likelihoods, to be differentiated once, and the plain sum.

    A head or hidden states that need no gradient get no product for one; without any, or where gradients are off,
    only the value is computed.

    Args:
        hidden: (N, D), final hidden states of the positions that have a target.
        head: (V, D), dtype of `hidden`.
        targets: (N,) int64.
        scale: factor of the first result, such as 1 / target tokens of the whole batch.
        chunk: tokens per chunk; by default as many as `chunk_tokens` says.
        feeds: if given, they get the rows of the head's gradient that they want, in the backward pass, and autograd
            gets none; the head has to require a gradient.

    Returns:
        `scale` times the sum (fp32 scalar, differentiable) and the sum (float64 scalar of the fp32 token losses,
        detached).
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        result: tuple[Tensor, Tensor] = applied(_ChunkedNLL, hidden, head, targets, scale, chunk, feeds)
        return result
    total = token_nll(hidden, head, targets, chunk).sum(dtype=torch.float64)
    return (total * scale).float(), total


@torch.no_grad()
def token_nll(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Negative log likelihood of each target, (N,) fp32; arguments as in `chunked_nll`, nothing is differentiated."""
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    for part in _chunks(hidden, head, chunk):
        _log_softmax_step(product(hidden[part], head.t()), targets[part], losses[part], gradient_scale=None)
    return losses


class _ChunkedNLL(torch.autograd.Function):
    """The sum as a function of hidden states and head; its backward hands out what the forward has made."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        scale: float,
        chunk: int | None,
        feeds: Sequence[Feed],
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        wanted = [feed.wanted_rows() for feed in feeds] if feeds else [None] if needs_head else []
        losses, hidden_gradient, head_gradients = _with_gradients(
            hidden, head, targets, scale, chunk, needs_hidden=needs_hidden, wanted=wanted
        )
        ctx.gradients = (hidden_gradient, [gradient.to(head.dtype) for gradient in head_gradients])
        ctx.feeds = feeds
        total = losses.sum(dtype=torch.float64)
        ctx.mark_non_differentiable(total)
        return (total * scale).float(), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of chunked_nll are handed out once; call it again for a second backward")
        # The context lets go of the buffers, so that autograd can make them `parameter.grad` without a copy.
        hidden_gradient, head_gradients = ctx.gradients
        ctx.gradients = None
        # Reading the factor costs nothing on CPU; elsewhere it would wait for the device, so it is multiplied in.
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
            for gradient in (hidden_gradient, *head_gradients):
                if gradient is not None:
                    gradient.mul_(grad_loss)
        for feed in ctx.feeds:
            feed.accept_rows(head_gradients.pop(0))
        head_gradient = head_gradients.pop() if head_gradients else None
        return hidden_gradient, head_gradient, None, None, None, None


def _with_gradients(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    scale: float,
    chunk: int | None,
    *,
    needs_hidden: bool,
    wanted: Sequence[Wanted | None],
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Token losses (N,) fp32, and the gradients of their scaled sum: of `hidden`, and of each part of `head` wanted."""
    parts = _chunks(hidden, head, chunk)
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
    sums = [HeadSum(head, rows, num_chunks=len(parts)) for rows in wanted]
    scratch = None
    if takes_out(hidden):
        scratch = hidden.new_empty(max((part.stop - part.start for part in parts), default=0), head.shape[0])
    for part in parts:
        room = None if scratch is None else scratch[: part.stop - part.start]
        logits = product(hidden[part], head.t(), out=room)
        _log_softmax_step(logits, targets[part], losses[part], gradient_scale=scale)
        if hidden_gradient is not None:
            hidden_gradient[part] = product(logits, head)
        if sums:
            add_chunk(sums, logits, hidden[part], targets[part], losses[part], scale)
        del logits  # before those of the next chunk are made
    return losses, hidden_gradient, [each.result() for each in sums]


def _chunks(hidden: Tensor, head: Tensor, chunk: int | None) -> list[slice]:
    """Slices of nearly equal length, at most `chunk` tokens each, that cover all tokens."""
    tokens = hidden.shape[0]
    limit = chunk if chunk is not None else chunk_tokens(head.shape[0], head.element_size())
    count = -(-tokens // limit)
    bounds = [tokens * index // count for index in range(count + 1)] if count else [0]
    return [slice(start, end) for start, end in pairwise(bounds)]


def _log_softmax_step(logits: Tensor, targets: Tensor, losses: Tensor, *, gradient_scale: float | None) -> None:
    """Write the token losses of one chunk; with `gradient_scale`, replace `logits` by the gradient of the scaled sum.

    Args:
        logits: (n, V), any float dtype; overwritten.
        targets: (n,) int64.
        losses: (n,) fp32, written.
        gradient_scale: factor of softmax - onehot; None leaves undefined values in `logits`.
    """
    rows = cached_rows(logits.shape[1], logits)
    for start in range(0, logits.shape[0], rows):
        part = slice(start, start + rows)
        values = logits[part].float()  # the logits themselves if they are fp32
        column = targets[part].unsqueeze(1)
        largest = values.amax(1, keepdim=True)
        values.sub_(largest)
        at_target = values.gather(1, column)
        # On CPU torch takes exp from MKL, which is four times slower than its own exp2 where the maker of the
        # processor is not MKL's.
        sums = values.mul_(LOG2_E).exp2_().sum(1, keepdim=True)
        torch.sub(sums.log(), at_target, out=losses[part].unsqueeze(1))
        if gradient_scale is not None:
            values.mul_(gradient_scale / sums)
            values.scatter_add_(1, column, torch.full_like(at_target, -gradient_scale))
            if values.dtype != logits.dtype:
                logits[part].copy_(values)
