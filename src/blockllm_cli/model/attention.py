"""Softmax attention of queries over keys: the framework's kernel, and one of our own where that is faster.

Measured on CPU in bf16 (forward and backward, one core with bf16 dot products): the framework's kernel takes 3.1, 1.9
and 1.8 times as long as `_BlockedAttention` at rows of 128, 256 and 512 positions, as long at 1,024 and half as long at
2,048; in fp32 it is never slower.

Letters: B rows, L positions, H query heads, G key and value heads, R = H / G query heads that share one, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from blockllm_cli.model.autograd import applied

_CACHE_BYTES = 2**20
"""Scores in fp32 are made for as many heads at once as stay in a core's second-level cache."""

_LONGEST_ROW = 512
"""Longest row for `_BlockedAttention`, which does not skip the masked half of the scores."""


def attention_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to attention scores so that a position sees its own document up to itself: (B, 1, L, L) of 0, -inf.

    Made once per batch in the dtype of the queries: a boolean mask would be turned into this one by every layer, and
    every layer's copy would be kept for the backward pass.

    Args:
        documents: (B, L), index of the document of each position.
        dtype: dtype of the queries.
    """
    length = documents.shape[1]
    visible = documents.unsqueeze(2) == documents.unsqueeze(1)
    visible &= torch.ones(length, length, dtype=torch.bool, device=documents.device).tril_()
    mask = torch.zeros(visible.shape, dtype=dtype, device=documents.device)
    return mask.masked_fill_(~visible, float("-inf")).unsqueeze(1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention, (B, L, H * K).

    Args:
        query: (B, H, L, K).
        key: (B, G, L, K); query head h attends to head h // R.
        value: (B, G, L, K).
        mask: what `attention_mask` makes; None where every row is one document.
    """
    if is_blocked(query):
        mixed: Tensor = applied(_BlockedAttention, query, key, value, mask)
    else:
        is_grouped = query.shape[1] != key.shape[1]
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=is_grouped
        )
    return mixed.transpose(1, 2).flatten(2)


def is_blocked(query: Tensor) -> bool:
    """Whether `blocked_attention` is the faster one for `query` (B, H, L, K)."""
    return query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.shape[2] <= _LONGEST_ROW


class _BlockedAttention(torch.autograd.Function):
    """`blocked_attention`; keeps queries, keys and values for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        mask = _causal_mask(query) if mask is None else mask
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        ctx.save_for_backward(query, key, value, mask)
        return blocked_attention(query, key, value, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *blocked_attention_backward(gradient, *ctx.saved_tensors), None


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention a few heads at a time, with plain batched products and an fp32 softmax that stays in the cache.

    Arguments and result, (B, H, L, K), as in `attend`; autograd is not to look on.
    """
    mask = _causal_mask(query) if mask is None else mask
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    mixed = torch.empty_like(query)
    queries, mixed_heads = _by_key_head(query, key), _by_key_head(mixed, key)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    for heads, rows in _blocks(query, key):
        weights = _weights(queries[heads], keys[heads], mask[rows])
        torch.bmm(weights.to(query.dtype), values[heads], out=mixed_heads[heads])
    return mixed


def blocked_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `query`, `key` and `value`, given that of the result; the scores are made again."""
    mask = _causal_mask(query) if mask is None else mask
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    made = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    queries, keys, values = _by_key_head(query, key), key.flatten(0, 1), value.flatten(0, 1)
    query_gradient, key_gradient, value_gradient = (
        _by_key_head(made[0], key),
        made[1].flatten(0, 1),
        made[2].flatten(0, 1),
    )
    gradients = _by_key_head(gradient.contiguous(), key)
    scale = query.shape[-1] ** -0.5
    for heads, rows in _blocks(query, key):
        weights = _weights(queries[heads], keys[heads], mask[rows])
        torch.bmm(weights.to(query.dtype).transpose(1, 2), gradients[heads], out=value_gradient[heads])
        # Softmax backward: weights * (g - sum(weights * g)), g being the gradient of the weights.
        change = torch.bmm(gradients[heads], values[heads].transpose(1, 2)).float()
        change.sub_((change * weights).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
        narrow = change.to(query.dtype)
        torch.bmm(narrow, keys[heads], out=query_gradient[heads])
        torch.bmm(narrow.transpose(1, 2), queries[heads], out=key_gradient[heads])
    return made


def _causal_mask(query: Tensor) -> Tensor:
    length = query.shape[2]
    return query.new_full((length, length), float("-inf")).triu_(1).expand(query.shape[0], 1, length, length)


def _by_key_head(tensor: Tensor, key: Tensor) -> Tensor:
    """(B, H, L, K) as (B * G, R * L, K): the query heads that share a key head one below the other."""
    return tensor.view(key.shape[0] * key.shape[1], -1, tensor.shape[-1])


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the B * G key heads whose scores fit the cache, each with the rows of the batch that they are of.

    A block is whole rows, or part of one row.
    """
    num_rows, per_row, length, _ = key.shape
    head_bytes = 4 * length * length * (query.shape[1] // per_row)
    fitting = max(1, _CACHE_BYTES // head_bytes)
    if fitting >= per_row:
        step = fitting // per_row
        for row in range(0, num_rows, step):
            yield slice(row * per_row, min(row + step, num_rows) * per_row), slice(row, row + step)
        return
    for row in range(num_rows):
        for head in range(0, per_row, fitting):
            last = min(head + fitting, per_row)
            yield slice(row * per_row + head, row * per_row + last), slice(row, row + 1)


def _weights(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """Softmax of the scores of one block, fp32 (heads, R * L, L).

    Args:
        queries: (heads, R * L, K).
        keys: (heads, L, K).
        mask: (rows, 1, L, L), heads being a multiple of rows.
    """
    length = keys.shape[1]
    scores = torch.bmm(queries, keys.transpose(1, 2)).float().mul_(queries.shape[-1] ** -0.5)
    scores.view(mask.shape[0], -1, length, length).add_(mask)
    return F.softmax(scores, dim=-1)
