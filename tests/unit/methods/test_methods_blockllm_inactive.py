"""The rule for entries without state works in slices of which no bit tells."""

import pytest
import torch

from blockllm_cli.methods.blockllm import inactive
from blockllm_cli.methods.blockllm.inactive import InactiveRule
from blockllm_cli.optim.entries import Entries
from blockllm_cli.optim.precision import precision_of


@pytest.mark.parametrize("kind", ["sign", "normalized"])
@pytest.mark.parametrize("rounding_word", ["nearest", "stochastic"])
def test_the_size_of_slices_shows_in_no_bit(kind, rounding_word, monkeypatch):
    found = []
    for entries in (2**18, 128):
        monkeypatch.setattr(inactive, "SLICE_ENTRIES", entries)
        draw = torch.Generator().manual_seed(2)
        weight, gradient = (torch.randn(30, 33, generator=draw).bfloat16() for _ in range(2))
        kept = [Entries.of(torch.arange(0, 990, 3), (30, 33))]
        InactiveRule(kind, 0.5, precision_of("bf16", rounding_word), 1).write(
            weight, gradient, kept, rate=1e-2, key="w/inactive/1"
        )
        found.append(weight)
    assert torch.equal(*found)
