"""The largest entries found through a guess: the same as by sorting, whatever the sample said."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockllm_cli.optim import largest
from blockllm_cli.optim.largest import largest_entries


def by_sorting(values, count):
    return torch.sort(values.abs(), descending=True, stable=True).indices[:count].sort().values


def drawn(numel, seed, distinct=None, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    if distinct is None:
        return torch.randn(numel, generator=draw).to(dtype)
    return torch.randint(-distinct, distinct + 1, (numel,), generator=draw).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(1, 5000),
    share=st.floats(0, 1),
    distinct=st.sampled_from([None, 0, 1, 5, 300]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_a_guess_never_shows(numel, share, distinct, dtype, seed):
    """Slices and samples are small here, so that guesses are poor and ties cross slices."""
    values, count = drawn(numel, seed, distinct, dtype), int(share * numel)
    kept = largest._SLICE, largest._SAMPLES
    largest._SLICE, largest._SAMPLES = 256, 16
    try:
        assert torch.equal(largest_entries(values, count), by_sorting(values, count))
    finally:
        largest._SLICE, largest._SAMPLES = kept


@pytest.mark.parametrize("seen", [0.0, 100.0])
def test_a_sample_that_misleads_costs_time_only(seen, monkeypatch):
    """All that is sampled is smaller, or larger, than the rest: too many pass then, or too few."""
    values = drawn(40_000, 3)
    monkeypatch.setattr(largest, "_SAMPLES", 100)
    values[:: 40_000 // 100 | 1] = seen
    assert largest._guessed(values, 5000) is None
    assert torch.equal(largest_entries(values, 5000), by_sorting(values, 5000))


def test_a_good_sample_is_used():
    values = drawn(200_000, 4)
    found = largest._guessed(values, 20_000)
    assert found is not None
    assert torch.equal(found, by_sorting(values, 20_000))


def test_equal_entries_do_not_fill_the_memory():
    """Where most entries tie with the threshold, positions of all of them are not held."""
    values = torch.zeros(50_000)
    values[::100] = 1.0
    assert largest._guessed(values, 1000) is None
    assert torch.equal(largest_entries(values, 1000), by_sorting(values, 1000))
