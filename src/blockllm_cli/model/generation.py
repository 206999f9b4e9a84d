"""Continuing a prompt token by token, with the keys and values of earlier positions kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from blockllm_cli.errors import InputError
from blockllm_cli.model.attention import attend
from blockllm_cli.model.llama import Attention, DecoderLayer, LlamaForCausalLM
from blockllm_cli.model.rotary import Turn


@torch.inference_mode()
def generate(
    model: LlamaForCausalLM,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    stop_id: int | None = None,
) -> list[int]:
    """Tokens that follow `prompt_ids`, without the prompt and without `stop_id`.

    There is no longest length: rotary angles go on beyond the rows that the model was trained on, but the quality of
    what it writes there does not.

    Args:
        model: any dtype, any device.
        prompt_ids: at least one id; begin with the BOS id where the model was trained with one.
        max_new_tokens: most tokens to make.
        temperature: the logits are divided by it before sampling; 0 takes the likeliest token each time.
        top_k: sample among this many likeliest tokens only; None is all.
        generator: source of the draws, on the CPU; None is torch's global one.
        stop_id: ends the text, usually the EOS id.

    Raises:
        ValueError: the prompt is empty, or `temperature` or `top_k` is out of range.
    """
    if not prompt_ids:
        raise ValueError("the prompt has no token; begin with the BOS id")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    device = model.head_weight.device
    decoder = _Decoder(model, capacity=len(prompt_ids) + max_new_tokens)
    following = torch.tensor([list(prompt_ids)], device=device)
    made: list[int] = []
    while len(made) < max_new_tokens:
        token = _pick(decoder.next_logits(following), temperature, top_k, generator)
        if token == stop_id:
            break
        made.append(token)
        following = torch.tensor([[token]], device=device)
    return made


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> int:
    """One token from `logits` (V,), drawn on the CPU so that a seed means the same on every device."""
    wide = logits.float().cpu()
    if not wide.isfinite().all():
        raise InputError("the model gives values that are not finite: its training diverged")
    if temperature == 0:
        return int(wide.argmax())
    kept = wide.topk(min(top_k or wide.numel(), wide.numel()))
    choice = torch.multinomial(F.softmax(kept.values / temperature, dim=-1), 1, generator=generator)
    return int(kept.indices[choice])


class _Decoder:
    """Runs a model over one text, piece by piece.

    Args:
        model: the model.
        capacity: most positions of the text.
    """

    def __init__(self, model: LlamaForCausalLM, capacity: int) -> None:
        config = model.config
        self.model = model
        self.length = 0
        shape = (2, config.num_hidden_layers, 1, config.num_key_value_heads, capacity, config.head_dim)
        self.keys, self.values = model.head_weight.new_empty(shape).unbind()
        self.turn = model.model.rotary.turn(capacity, model.head_weight.device, model.head_weight.dtype)

    def next_logits(self, ids: Tensor) -> Tensor:
        """Logits (V,) of the token after `ids` (1, n), which follow the ids of earlier calls.

        Only the first call may bring more than one id.
        """
        parts = slice(self.length, self.length + ids.shape[1])
        self.length = parts.stop
        turn = Turn(self.turn.cosine[parts], self.turn.sine[parts])
        x = self.model.model.embed_tokens(ids)
        for index, module in enumerate(self.model.model.layers):
            layer = cast(DecoderLayer, module)
            x = x + self._attend(layer.self_attn, index, layer.input_layernorm(x), turn, parts)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return F.linear(self.model.model.norm(x[0, -1]), self.model.head_weight)

    def _attend(self, attention: Attention, index: int, x: Tensor, turn: Turn, parts: slice) -> Tensor:
        query, key, value = attention.projected(x, turn)
        keys, values = self.keys[index], self.values[index]
        keys[:, :, parts], values[:, :, parts] = key, value
        if parts.start == 0:
            mixed = attend(query, key, value, None)
        else:
            kept = slice(parts.stop)
            is_grouped = query.shape[1] != key.shape[1]
            mixed = F.scaled_dot_product_attention(query, keys[:, :, kept], values[:, :, kept], enable_gqa=is_grouped)
            mixed = mixed.transpose(1, 2).flatten(2)
        return cast(Tensor, attention.o_proj(mixed))
