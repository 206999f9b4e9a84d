from __future__ import annotations

import pytest
import torch

from blockllm_cli.errors import InputError
from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.llama import build_model
from blockllm_cli.model.weights import load_weights

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def stored():
    return {name: tensor.clone() for name, tensor in build_model(CONFIG, seed=1).state_dict().items()}


def test_weights_are_loaded_in_place(stored):
    model = build_model(CONFIG, seed=2)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    load_weights(model, stored)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: tensors.pop(NAME), f"lack '{NAME}'"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "hold 'extra'"),
        (lambda tensors: tensors.update({NAME: torch.ones(16, 24)}), rf"'{NAME}' has shape \(16, 24\).*\(24, 16\)"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].bfloat16()}), rf"'{NAME}' is torch.bfloat16.*float32"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name_and_nothing_is_written(stored, change, text):
    """R14: a missing, extra or differently shaped tensor is an error that names it."""
    model = build_model(CONFIG, seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(stored)
    with pytest.raises(InputError, match=text):
        load_weights(model, stored)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
