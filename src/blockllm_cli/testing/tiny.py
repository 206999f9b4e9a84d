"""The tiny Llama and the fixed batches that every check of a method runs on."""

from __future__ import annotations

import torch

from blockllm_cli.model.batch import Batch
from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.llama import LlamaForCausalLM, build_model

ROWS, LENGTH, VOCABULARY = 6, 12, 64


def tiny_config(*, tied: bool = False, layers: int = 2) -> LlamaConfig:
    """Grouped queries, every matrix of another shape than its neighbours'; 6,000 parameters with two layers."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )


def tiny_llama(dtype: torch.dtype = torch.float32, *, tied: bool = False, seed: int = 3) -> LlamaForCausalLM:
    """The model on the CPU with the weights of `seed`."""
    return build_model(tiny_config(tied=tied), seed=seed, dtype=dtype, device=torch.device("cpu"))


def tiny_batch(step: int, rows: slice = slice(None)) -> Batch:
    """Rows of update `step`: half of the ids repeat, so that there is something to learn; all positions are targets."""
    draw = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=draw)
    ids[:, 1::2] = ids[:, 0:-1:2]
    return _batch(ids[rows])


def covering_batch(step: int, rows: slice = slice(None)) -> Batch:
    """As `tiny_batch`, with every id of the vocabulary among the inputs, so that each row of the embedding learns."""
    draw = torch.Generator().manual_seed(2000 + step)
    inputs = torch.arange(ROWS * LENGTH) % VOCABULARY
    ids = inputs[torch.randperm(ROWS * LENGTH, generator=draw)].view(ROWS, LENGTH)
    return _batch(torch.cat([ids, ids[:, :1]], dim=1)[rows])


def _batch(ids: torch.Tensor) -> Batch:
    targets = ids[:, 1:].reshape(-1)
    return Batch(ids[:, :-1].contiguous(), None, torch.arange(targets.numel()), targets)
