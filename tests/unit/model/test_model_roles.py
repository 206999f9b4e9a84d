from __future__ import annotations

from collections import Counter

import pytest

from blockllm_cli.model.config import llama_config
from blockllm_cli.model.roles import layer_of, role_of
from blockllm_cli.recipe.sections import Model


def test_every_parameter_has_its_role_and_layer():
    shapes = llama_config(Model(size="9m"), tokenizer_vocab_size=64).parameter_shapes()
    assert Counter(map(role_of, shapes)) == {"embedding": 1, "attention": 16, "mlp": 12, "norm": 9, "head": 1}
    assert Counter(map(layer_of, shapes)) == {None: 3, 0: 9, 1: 9, 2: 9, 3: 9}


@pytest.mark.parametrize("name", ["transformer.wte.weight", "model.layers.0.bias", ""])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="not a parameter name of a Llama"):
        role_of(name)
