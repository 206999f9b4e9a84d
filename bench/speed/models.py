"""The models that are trained: shapes, with the keys of Hugging Face's config, and what the package makes of them."""

from __future__ import annotations

from typing import Any

from blockllm_cli.model.config import SIZES, LlamaConfig

Shape = dict[str, int]


def shape_of(size: str, vocab_size: int = 32_000) -> Shape:
    """A published size."""
    return {"vocab_size": vocab_size, **SIZES[size]}


def config_of(shape: Shape) -> LlamaConfig:
    """The package's config of a shape, without grouped queries."""
    fields: dict[str, Any] = {**shape, "num_key_value_heads": shape["num_attention_heads"]}
    return LlamaConfig(**fields)


def parameter_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter."""
    return config_of(shape).parameter_shapes()
