"""A Llama in plain torch, in the manner of nanoGPT, written to be as fast as that is without kernels of one's own.

Fused query-key-value and gate-up products, scaled dot-product attention, rotary tables made once, torch's RMSNorm,
logits and cross-entropy as they come.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A decoder layer."""

    def __init__(self, hidden: int, intermediate: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.query_key_value = nn.Linear(hidden, 3 * hidden, bias=False)
        self.attention_out = nn.Linear(hidden, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Residual stream (rows, length, hidden) in and out; `cos`, `sin`: (length, head width)."""
        rows, length, hidden = x.shape
        merged = self.query_key_value(self.attention_norm(x)).view(rows, length, 3, self.heads, -1)
        query, key, value = merged.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            _rotated(query, cos, sin), _rotated(key, cos, sin), value, is_causal=True
        )
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(rows, length, hidden))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        out: Tensor = x + self.down(F.silu(gate) * up)
        return out


class Llama(nn.Module):
    """The language model; `shape` has the keys of Hugging Face's `LlamaConfig`."""

    def __init__(self, shape: Mapping[str, int], longest: int) -> None:
        super().__init__()
        hidden, heads, vocab = shape["hidden_size"], shape["num_attention_heads"], shape["vocab_size"]
        self.embedding = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(
            Block(hidden, shape["intermediate_size"], heads) for _ in range(shape["num_hidden_layers"])
        )
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.head = nn.Linear(hidden, vocab, bias=False)
        width = hidden // heads
        angles = torch.outer(torch.arange(longest), 10000.0 ** -(torch.arange(0, width, 2) / width)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean negative log likelihood of `targets`; both int64 (rows, length)."""
        cos, sin = self.get_buffer("cos")[: ids.shape[1]], self.get_buffer("sin")[: ids.shape[1]]
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
