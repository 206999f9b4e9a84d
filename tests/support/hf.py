"""Checkpoints of Hugging Face's form, and the logits of transformers, for tests that compare with them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.hf_config import config_json
from blockllm_cli.model.llama import build_model
from blockllm_cli.model.weights import save_tensors
from blockllm_cli.runner.export_files import write_weights

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""A Llama with grouped heads, small enough for any test."""


def small_config(**change) -> LlamaConfig:
    return LlamaConfig(**(SMALL | change))


def written_checkpoint(
    folder: Path, config: LlamaConfig | None = None, *, dtype=torch.float32, shard_bytes: int = 10**9, **changed
) -> dict[str, Tensor]:
    """Write a checkpoint with drawn weights, `changed` in its config.json, and return the weights."""
    config = config or small_config()
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(config, seed=41, dtype=dtype)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_weights(folder, weights, dtype, lambda: False, shard_bytes=shard_bytes)
    word = str(dtype).removeprefix("torch.")
    content = config_json(config, dtype=word, positions=64, bos_id=1, eos_id=2) | changed
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return weights


def rewritten(folder: Path, **changed: Tensor | None) -> None:
    """Change tensors of a checkpoint in one file; None takes one out. `__` in a name stands for a dot."""
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changed.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_tensors(tensors, path)


@torch.inference_mode()
def transformers_logits(folder: Path, ids: Tensor, dtype=torch.float32) -> Tensor:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(ids).logits


def random_ids(vocab_size: int = 300, *, rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(2))
