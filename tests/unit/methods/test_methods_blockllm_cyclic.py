"""Cyclic order: every block has its turn, whatever the sizes."""

import pytest

from blockllm_cli.methods.base import Rates
from support.methods import drive_update, make_method, toy_llama


@pytest.mark.parametrize("granularity", ["tensor", "layer"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.65])
def test_no_block_waits_for_ever(granularity, sparsity):
    options = {"granularity": granularity, "sparsity": sparsity, "always": (), "max_interval": 1}
    method, model = make_method("blockllm", score="cyclic", **options), toy_llama()
    method.prepare(model)
    blocks = [block.name for block in method.chooser.layout.blocks]
    waited = dict.fromkeys(blocks, 0)
    for step in range(1, 31):
        (event,) = drive_update(method, model, step, Rates(1e-3, 1e-3)).events
        taken = {block["name"] for block in event["blocks"]}
        waited = {name: 0 if name in taken else count + 1 for name, count in waited.items()}
        assert max(waited.values()) < len(blocks), max(waited, key=waited.get)
