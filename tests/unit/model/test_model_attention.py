from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from blockllm_cli.model import attention
from blockllm_cli.model.attention import attend, attention_mask


def reference(query, key, value, documents):
    """Attention in float64 from its definition, with gradients for an upstream gradient of ones times 0.1 steps."""
    length, shared = query.shape[2], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1).expand(query.shape[0], length, length)
    if documents is not None:
        hidden = hidden | (documents[:, :, None] != documents[:, None, :])
    weights = scores.masked_fill(hidden.unsqueeze(1), float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def run(function, tensors, upstream):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    result = function(*leaves)
    result.backward(upstream.to(result.dtype))
    return [result.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("cache_bytes", [1, 4 * 24 * 24 * 3, 2**20], ids=["a head", "part of a row", "all"])
def test_blocked_attention_is_attention(monkeypatch, has_documents, heads, key_heads, cache_bytes):
    monkeypatch.setattr(attention, "_CACHE_BYTES", cache_bytes)
    torch.manual_seed(0)
    length, width = 24, 16
    shapes = [(3, heads, length, width), (3, key_heads, length, width), (3, key_heads, length, width)]
    tensors = [torch.randn(shape).bfloat16() for shape in shapes]
    upstream = torch.randn(3, length, heads * width)
    documents = torch.randint(0, 3, (3, length)).sort(1).values if has_documents else None
    mask = None if documents is None else attention_mask(documents, torch.bfloat16)
    exact = run(lambda *qkv: reference(*qkv, documents), [tensor.double() for tensor in tensors], upstream)
    ours = run(lambda *qkv: attend(*qkv, mask), tensors, upstream)
    for made, true in zip(ours, exact, strict=True):
        assert made.dtype == torch.bfloat16
        assert (made.double() - true).norm() < 6e-3 * true.norm()  # measured: 2.6e-3 to 4.0e-3


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("has_documents", [False, True])
def test_fp32_attention_is_exact(heads, key_heads, has_documents):
    torch.manual_seed(0)
    shapes = [(2, heads, 20, 8), (2, key_heads, 20, 8), (2, key_heads, 20, 8)]
    tensors, upstream = [torch.randn(shape) for shape in shapes], torch.randn(2, 20, heads * 8)
    documents = torch.randint(0, 3, (2, 20)).sort(1).values if has_documents else None
    mask = None if documents is None else attention_mask(documents, torch.float32)
    exact = run(lambda *qkv: reference(*qkv, documents), [tensor.double() for tensor in tensors], upstream)
    for made, true in zip(run(lambda *qkv: attend(*qkv, mask), tensors, upstream), exact, strict=True):
        torch.testing.assert_close(made.double(), true, atol=3e-6, rtol=1e-5)


def test_blocked_attention_keeps_nothing_of_the_size_of_scores():
    query = torch.randn(2, 2, 64, 8, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        attend(query, query, query, None)
    mask_bytes = 64 * 64 * 2  # one causal mask, shared by all rows and heads
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) <= 3 * query.numel() * 2 + mask_bytes


def test_long_rows_and_fp32_take_the_frameworks_kernel(monkeypatch):
    calls = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    for length, dtype in ((513, torch.bfloat16), (4, torch.float32), (512, torch.bfloat16)):
        attend(*(torch.randn(1, 1, length, 2, dtype=dtype) for _ in range(3)), None)
    assert len(calls) == 2
