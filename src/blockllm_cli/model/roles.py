"""What a parameter of a Llama is, read off its Hugging Face name: its role, and the decoder layer it belongs to."""

from __future__ import annotations

import re
from typing import Literal, get_args

Role = Literal["embedding", "attention", "mlp", "norm", "head"]
ROLES: tuple[Role, ...] = get_args(Role)

# Roles that `schedule.dense_rate` applies to: what every compared method trains densely beside the matrices.
DENSE_ROLES: frozenset[Role] = frozenset({"embedding", "head", "norm"})

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def role_of(name: str) -> Role:
    """Role of the parameter `name`, such as `model.layers.3.mlp.up_proj.weight` -> "mlp".

    With tied embeddings the one shared tensor is named `model.embed_tokens.weight` and counts as the embedding.

    Raises:
        ValueError: the name is not one of a Llama.
    """
    if name == "model.embed_tokens.weight":
        return "embedding"
    if name == "lm_head.weight":
        return "head"
    if name == "model.norm.weight" or name.endswith("layernorm.weight"):
        return "norm"
    if ".self_attn." in name:
        return "attention"
    if ".mlp." in name:
        return "mlp"
    raise ValueError(f"{name!r} is not a parameter name of a Llama")


def layer_of(name: str) -> int | None:
    """Index of the decoder layer that holds `name`, or None for embedding, final norm and head."""
    match = _LAYER.match(name)
    return int(match.group(1)) if match else None
