"""The Llama architecture in plain PyTorch, with the parameter names and the numerics of Hugging Face's.

Letters: B rows, L positions, D hidden size, H heads, K head width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blockllm_cli.model.attention import attend, attention_mask
from blockllm_cli.model.batch import Batch
from blockllm_cli.model.compiled import CompiledLayer, LayerCompiler
from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.elementwise import gated_silu, rms_norm
from blockllm_cli.model.linears import Linear, SelfFeeding, fed
from blockllm_cli.model.loss import chunked_nll, token_nll
from blockllm_cli.model.roles import role_of
from blockllm_cli.model.rotary import Rotary, Turn, turned


class RMSNorm(SelfFeeding):
    """Root mean square normalisation of the last dimension; see `rms_norm`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of `x` (any dtype)."""
        return rms_norm(x, fed(self.weight, self.feeds), self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key and value heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        key_value = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, key_value)
        self.v_proj = Linear(config.hidden_size, key_value)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, turn: Turn, mask: Tensor | None) -> Tensor:
        """Attend within `x` (B, L, D); `mask` as `attention_mask` makes it."""
        query, key, value = self.projected(x, turn)
        return cast(Tensor, self.o_proj(attend(query, key, value, mask)))

    def projected(self, x: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries, turned keys and values of `x` (B, L, D), each (B, heads, L, K)."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        query, key = turned(self.q_proj(x).view(heads), turn), turned(self.k_proj(x).view(heads), turn)
        return query, key, self.v_proj(x).view(heads).transpose(1, 2)


class MLP(nn.Module):
    """The gated MLP: down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of `x` (B, L, D)."""
        return cast(Tensor, self.down_proj(gated_silu(self.gate_proj(x), self.up_proj(x))))


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.compiled: CompiledLayer | None = None

    def compile_with(self, compiler: LayerCompiler) -> None:
        """Run by `compiler`'s function where that can be; names and values of parameters stay as they are."""
        attention, mlp = self.self_attn, self.mlp
        self.compiled = CompiledLayer(
            (self.input_layernorm, self.post_attention_layernorm),
            (
                attention.q_proj,
                attention.k_proj,
                attention.v_proj,
                attention.o_proj,
                mlp.gate_proj,
                mlp.up_proj,
                mlp.down_proj,
            ),
            head_dim=attention.head_dim,
            eps=self.input_layernorm.eps,
            compiler=compiler,
        )

    def forward(self, x: Tensor, turn: Turn, mask: Tensor | None) -> Tensor:
        """Add this layer's two terms to the residual stream `x` (B, L, D)."""
        if self.compiled is not None and (output := self.compiled.call(x, turn, mask)) is not None:
            return output
        x = x + self.self_attn(self.input_layernorm(x), turn, mask)
        return cast(Tensor, x + self.mlp(self.post_attention_layernorm(x)))


class LlamaModel(nn.Module):
    """Everything but the head.

    Args:
        config: the architecture.
        checkpoint_activations: keep only the input of each layer for the backward pass and run the layer again there.
    """

    def __init__(self, config: LlamaConfig, *, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        # Values come from outside. Drawing some on the meta device first would import the compiler, a second of work.
        empty = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=empty)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.head_dim, config.rope_theta)

    def forward(self, input_ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Final hidden states (B, L, D), after the norm, of `input_ids` (B, L); `documents` as in `Batch`."""
        x = cast(Tensor, self.embed_tokens(input_ids))
        turn = self.rotary.turn(input_ids.shape[1], x.device, x.dtype)
        mask = None if documents is None else attention_mask(documents, x.dtype)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, turn, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, turn, mask)
        return cast(Tensor, self.norm(x))


class LlamaForCausalLM(nn.Module):
    """The model with its head; `build_model` gives it its initial weights.

    Args:
        config: the architecture.
        checkpoint_activations: see `LlamaModel`.
    """

    def __init__(self, config: LlamaConfig, *, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, checkpoint_activations=checkpoint_activations)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    @property
    def head_weight(self) -> nn.Parameter:
        """The head, (V, D): `lm_head.weight`, or the embedding if they are tied."""
        return cast(nn.Parameter, (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight)

    def forward(self, input_ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of every position; `loss` and `row_nll` do without them."""
        hidden = cast(Tensor, self.model(input_ids, documents))
        return F.linear(hidden, self.head_weight) if self.lm_head is None else cast(Tensor, self.lm_head(hidden))

    def compile_layers(self, backend: str = "inductor") -> LayerCompiler:
        """Let passes whose gradients go to routes run compiled layers from now on; the compiler counts its work.

        Args:
            backend: of `torch.compile`.
        """
        compiler = LayerCompiler(backend)
        for layer in self.model.layers:
            cast(DecoderLayer, layer).compile_with(compiler)
        return compiler

    def loss(self, batch: Batch, *, scale: float) -> tuple[Tensor, Tensor]:
        """`scale` times the negative log likelihood of the batch's targets, and its sum; see `chunked_nll`."""
        feeds = () if self.lm_head is None else self.lm_head.feeds
        return chunked_nll(self._target_states(batch), self.head_weight, batch.targets, scale=scale, feeds=feeds)

    @torch.inference_mode()
    def row_nll(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Negative log likelihood of each row, (B,) float64, from fp32 token losses; and its targets, (B,) int64."""
        losses = token_nll(self._target_states(batch), self.head_weight, batch.targets)
        shape = batch.input_ids.shape
        # Written by position and summed along rows: unlike adding by row index, the same on every run on every device.
        spread = torch.zeros(shape, dtype=torch.float64, device=losses.device)
        spread.view(-1)[batch.positions] = losses.double()
        counts = torch.zeros(shape, dtype=torch.int64, device=losses.device)
        counts.view(-1)[batch.positions] = 1
        return spread.sum(1), counts.sum(1)

    def _target_states(self, batch: Batch) -> Tensor:
        """Hidden states (T, D) of the positions that have a target; no copy if all have."""
        hidden = self.model(batch.input_ids, batch.documents).flatten(0, 1)
        if batch.num_targets == hidden.shape[0]:
            return cast(Tensor, hidden)
        return cast(Tensor, hidden.index_select(0, batch.positions))


def build_model(
    config: LlamaConfig,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    checkpoint_activations: bool = False,
) -> LlamaForCausalLM:
    """A model whose matrices are drawn from N(0, initializer_range) and whose norms are 1.

    A matrix depends on `seed`, its name and its shape alone: it is drawn in fp32 on the CPU, then rounded to `dtype`
    and moved to `device`, one at a time, so that at most one fp32 matrix exists beside the model.
    """
    return model_of(
        config,
        lambda name, shape: initial_values(name, shape, config.initializer_range, seed),
        dtype=dtype,
        device=device,
        checkpoint_activations=checkpoint_activations,
    )


def model_of(
    config: LlamaConfig,
    values: Callable[[str, Sequence[int]], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    checkpoint_activations: bool = False,
) -> LlamaForCausalLM:
    """A model whose parameters are `values(name, shape)`, asked for one at a time, in `dtype` and on `device`."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config, checkpoint_activations=checkpoint_activations)
    for name, placeholder in list(model.named_parameters()):
        made = values(name, placeholder.shape)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(made.to(device=device, dtype=dtype)))
    return model


def initial_values(name: str, shape: Sequence[int], std: float, seed: int) -> Tensor:
    """What `build_model` gives the parameter `name` of this shape before rounding: fp32, on the CPU.

    Args:
        name: as in `LlamaForCausalLM.named_parameters()`.
        shape: of the parameter.
        std: standard deviation of a matrix, `initializer_range`.
        seed: of the model.
    """
    if role_of(name) == "norm":
        return torch.ones(*shape)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(*shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def equal_to_initial(model: LlamaForCausalLM, names: Iterable[str], *, seed: int) -> list[str]:
    """Those of the parameters `names` whose values are what `build_model` gave them with `seed`.

    Each is drawn again and dropped before the next, so that at most one fp32 matrix exists beside the model.
    """
    unmoved = []
    for name in names:
        now = model.get_parameter(name)
        initial = initial_values(name, now.shape, model.config.initializer_range, seed)
        if torch.equal(now, initial.to(device=now.device, dtype=now.dtype)):
            unmoved.append(name)
    return unmoved
