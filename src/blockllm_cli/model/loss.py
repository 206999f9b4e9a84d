"""Negative log likelihood of target tokens straight from hidden states and head, without the logits of a whole batch.

Only the logits of one chunk of tokens exist at a time. In training the gradients of hidden states and head are made
in the forward pass, while a chunk's logits are at hand, so that nothing of size tokens x vocabulary outlives its chunk
and no product is done twice. The log-sum-exp is taken in fp32 whatever the dtype of the product.

Letters: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 32 * 2**20
"""Aim for the logits of one chunk, in bytes of the product's dtype; `bench/loss.py` has the measurements."""

_CACHE_BYTES = 2**20
"""On CPU the fp32 softmax works on groups of rows of this size, which stay in a core's second-level cache."""


def chunk_tokens(vocab_size: int, element_bytes: int) -> int:
    """Tokens per chunk, so that logits of `vocab_size` columns stay within `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (vocab_size * element_bytes))


def chunked_nll(
    hidden: Tensor, head: Tensor, targets: Tensor, *, scale: float, chunk: int | None = None
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

    Returns:
        `scale` times the sum (fp32 scalar, differentiable) and the sum (float64 scalar of the fp32 token losses,
        detached).
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        loss, total = _ChunkedNLL.apply(hidden, head, targets, scale, chunk)  # type: ignore[no-untyped-call]
        return loss, total
    total = token_nll(hidden, head, targets, chunk).sum(dtype=torch.float64)
    return (total * scale).float(), total


@torch.no_grad()
def token_nll(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Negative log likelihood of each target, (N,) fp32; arguments as in `chunked_nll`, nothing is differentiated."""
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    for part in _chunks(hidden, head, chunk):
        _log_softmax_step(hidden[part] @ head.t(), targets[part], losses[part], gradient_scale=None)
    return losses


class _ChunkedNLL(torch.autograd.Function):
    """The sum as a function of hidden states and head; its backward hands out what the forward has made."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, scale: float, chunk: int | None
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        losses, hidden_gradient, head_sum = _with_gradients(
            hidden, head, targets, scale, chunk, needs_hidden=needs_hidden, needs_head=needs_head
        )
        head_gradient = None if head_sum is None else head_sum.to(head.dtype)
        ctx.gradients = (hidden_gradient, head_gradient)
        total = losses.sum(dtype=torch.float64)
        ctx.mark_non_differentiable(total)
        return (total * scale).float(), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of chunked_nll are handed out once; call it again for a second backward")
        # The context lets go of the buffers, so that autograd can make them `parameter.grad` without a copy.
        hidden_gradient, head_gradient = ctx.gradients
        ctx.gradients = None
        # Reading the factor costs nothing on CPU; elsewhere it would wait for the device, so it is multiplied in.
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
            for gradient in (hidden_gradient, head_gradient):
                if gradient is not None:
                    gradient.mul_(grad_loss)
        return hidden_gradient, head_gradient, None, None, None


def _with_gradients(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    scale: float,
    chunk: int | None,
    *,
    needs_hidden: bool,
    needs_head: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Token losses (N,) fp32, and the gradients of their scaled sum: of `hidden`, and of `head`.

    The head's is summed over chunks in fp32 and returned so; that of a single chunk has the head's dtype.
    """
    parts = _chunks(hidden, head, chunk)
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
    head_sum = torch.zeros_like(head) if needs_head and not parts else None
    scratch = hidden.new_empty(max((part.stop - part.start for part in parts), default=0), head.shape[0])
    for part in parts:
        logits = torch.mm(hidden[part], head.t(), out=scratch[: part.stop - part.start])
        _log_softmax_step(logits, targets[part], losses[part], gradient_scale=scale)
        if hidden_gradient is not None:
            torch.mm(logits, head, out=hidden_gradient[part])
        if needs_head and len(parts) == 1:
            head_sum = logits.t() @ hidden
        elif needs_head:
            if head_sum is None:
                head_sum = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
            _add_product(head_sum, logits, hidden[part], targets[part], losses[part], scale)
    return losses, hidden_gradient, head_sum


def _chunks(hidden: Tensor, head: Tensor, chunk: int | None) -> list[slice]:
    """Slices of nearly equal length, at most `chunk` tokens each, that cover all tokens."""
    tokens = hidden.shape[0]
    limit = chunk if chunk is not None else chunk_tokens(head.shape[0], head.element_size())
    count = -(-tokens // limit)
    bounds = [tokens * index // count for index in range(count + 1)] if count else [0]
    return [slice(start, end) for start, end in pairwise(bounds)]


def _add_product(
    total: Tensor, gradient: Tensor, hidden: Tensor, targets: Tensor, losses: Tensor, scale: float
) -> None:
    """Add one chunk's gradient^T hidden to `total` (V, D) fp32; `gradient` (n, V) is overwritten."""
    if gradient.dtype == torch.float32:
        torch.addmm(total, gradient.t(), hidden, out=total)
        return
    _split_off_targets(total, gradient, hidden, targets, losses, scale)
    # Rounded products are added while they are in the cache; adding the whole product took as long as making it.
    rows = _cached_rows(hidden.shape[1], gradient)
    for start in range(0, total.shape[0], rows):
        total[start : start + rows].add_(gradient[:, start : start + rows].t() @ hidden)


def _split_off_targets(
    total: Tensor, gradient: Tensor, hidden: Tensor, targets: Tensor, losses: Tensor, scale: float
) -> None:
    """Take the -1 of unlikely targets out of `gradient` (n, V) and add its share to `total` (V, D) in fp32.

    The entries softmax - 1 are by far the largest, and rounding them and their products to bf16, chunk by chunk, would
    put the sum further from the truth than one product over all tokens is (measured: 2.4e-3 against 1.7e-3; so it is
    1.7e-3). Where the softmax is 1/2 or more, softmax - 1 is the smaller number and stays.
    """
    likelihoods = losses.neg().exp()
    ones = (likelihoods < 0.5).float()
    # Assigned by index: `scatter_` would go through an fp32 copy of all of `gradient`.
    rows = torch.arange(targets.numel(), device=targets.device)
    gradient[rows, targets] = ((likelihoods + ones - 1) * scale).to(gradient.dtype)
    total.index_add_(0, targets, hidden * (ones * -scale).unsqueeze(1))


def _cached_rows(columns: int, like: Tensor) -> int:
    """Rows of `columns` fp32 values that are worked on together: as many as the cache holds on CPU, else all."""
    return max(1, _CACHE_BYTES // (4 * columns)) if like.device.type == "cpu" else sys.maxsize


def _log_softmax_step(logits: Tensor, targets: Tensor, losses: Tensor, *, gradient_scale: float | None) -> None:
    """Write the token losses of one chunk; with `gradient_scale`, replace `logits` by the gradient of the scaled sum.

    Args:
        logits: (n, V), any float dtype; overwritten.
        targets: (n,) int64.
        losses: (n,) fp32, written.
        gradient_scale: factor of softmax - onehot; None leaves undefined values in `logits`.
    """
    rows = _cached_rows(logits.shape[1], logits)
    for start in range(0, logits.shape[0], rows):
        part = slice(start, start + rows)
        values = logits[part].float()  # the logits themselves if they are fp32
        column = targets[part].unsqueeze(1)
        largest = values.amax(1, keepdim=True)
        values.sub_(largest)
        at_target = values.gather(1, column)
        sums = values.exp_().sum(1, keepdim=True)
        torch.sub(sums.log(), at_target, out=losses[part].unsqueeze(1))
        if gradient_scale is not None:
            values.mul_(gradient_scale / sums)
            values.scatter_add_(1, column, torch.full_like(at_target, -gradient_scale))
            if values.dtype != logits.dtype:
                logits[part].copy_(values)
