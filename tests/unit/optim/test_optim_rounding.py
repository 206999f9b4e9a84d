"""Stochastic rounding: unbiased, exact where it should be, and a function of its key alone; both experiments of R16."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockllm_cli.optim import rounding
from blockllm_cli.optim.dense_state import DenseState
from blockllm_cli.optim.precision import precision_of
from blockllm_cli.optim.rounding import StochasticRounder
from blockllm_cli.optim.scratch import Scratch
from blockllm_cli.optim.sgd import SgdRule

DRAWS = 100_000


def rounded(source, *, seed=0, key="a/1"):
    target = torch.empty_like(source, dtype=torch.bfloat16)
    StochasticRounder(seed).write(target, source.clone(), key)
    return target


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, -2.71828e-3, 6.02e23, -1.6e-19, 1.0 + 2.0**-9])
def test_the_mean_is_the_value_and_only_neighbours_are_drawn(value):
    source = torch.full((DRAWS,), value)
    drawn = rounded(source)
    exact = float(source[0])
    low, high = sorted(set(drawn.tolist()))
    assert low < exact < high
    assert torch.nextafter(torch.tensor(low).bfloat16(), torch.tensor(high).bfloat16()).item() == high
    # The mean of DRAWS values that are low or high; 5 standard deviations.
    share = (exact - low) / (high - low)
    assert drawn.double().mean().item() == pytest.approx(
        exact, abs=5 * (high - low) * (share * (1 - share) / DRAWS) ** 0.5
    )


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False))
def test_what_bf16_holds_stays_and_all_else_becomes_a_neighbour(value):
    """Whatever the value, denormals and infinities included, its rounding is one of the two values around it."""
    source = torch.full((8,), value)
    drawn = rounded(source).float()
    toward_zero = (source.view(torch.int32) & -(2**16)).view(torch.float32)
    away = ((source.view(torch.int32) & -(2**16)) + 2**16).view(torch.float32)
    if torch.equal(toward_zero, source):
        assert torch.equal(drawn, source)
    else:
        assert ((drawn == toward_zero) | (drawn == away)).all()


def test_infinities_and_nan_of_any_payload_are_kept():
    payload = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    source = torch.cat([torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0]), payload]).repeat(1000)
    drawn = rounded(source).view(1000, 6)
    assert (drawn[:, 0] == float("inf")).all()
    assert (drawn[:, 1] == -float("inf")).all()
    assert drawn[:, [2, 4, 5]].isnan().all()
    assert (drawn[:, 3] == 1.0).all()


def test_draws_depend_on_seed_and_key_and_on_nothing_else():
    source = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    first = rounded(source)
    torch.manual_seed(2)
    rounder = StochasticRounder(0)
    target = torch.empty(5000, dtype=torch.bfloat16)
    rounder.write(target, source.clone(), "b/7")
    assert not torch.equal(target, first)
    rounder.write(target, source.clone(), "a/1")
    assert torch.equal(target, first)
    assert not torch.equal(rounded(source, seed=1), first)
    assert not torch.equal(rounded(source, key="a/2"), first)


def one_weight(value, rounding, entries):
    state = DenseState(SgdRule(), precision_of("bf16", rounding), seed=3)
    weight = torch.full((entries,), value, dtype=torch.bfloat16)
    state.allocate({"w": weight})
    return state, weight


def test_small_updates_vanish_with_nearest_rounding_and_are_counted():
    """R16: 100 updates of 1e-3 leave a bf16 weight of 1.0 where it was, and the share that did not move says so."""
    state, weight = one_weight(1.0, "nearest", 1000)
    for _ in range(100):
        share = state.update({"w": torch.full((1000,), 1.0)}, lambda _: 1e-3, count_unchanged=True)
        assert float(share) == 1.0
    assert (weight == 1.0).all()


def test_small_updates_survive_stochastic_rounding():
    """R16"""
    state, weight = one_weight(1.0, "stochastic", 20_000)
    for _ in range(100):
        share = state.update({"w": torch.full((20_000,), 1.0)}, lambda _: 1e-3, count_unchanged=True)
    assert weight.double().mean().item() == pytest.approx(0.9, abs=0.002)
    assert 0.0 < float(share) < 1.0


@pytest.mark.parametrize(("rounding", "mean"), [("nearest", 1.0), ("stochastic", 0.905)])
def test_weight_decay_under_either_rounding(rounding, mean):
    """R16: 1000 decays of 1e-4."""
    state = DenseState(SgdRule(weight_decay=1e-4), precision_of("bf16", rounding), seed=3)
    weight = torch.ones(4000, dtype=torch.bfloat16)
    state.allocate({"w": weight})
    for _ in range(1000):
        state.update({"w": torch.zeros(4000)}, lambda _: 1.0)
    assert weight.double().mean().item() == pytest.approx(mean, abs=0.0 if rounding == "nearest" else 0.005)


@settings(max_examples=40, deadline=None)
@given(
    entries=st.integers(1, 600),
    cuts=st.lists(st.integers(0, 150), max_size=6),
    seed=st.integers(0, 9),
    draw_entries=st.sampled_from([64, 128, 2**21]),
)
def test_how_a_tensor_is_cut_does_not_show(entries, cuts, seed, draw_entries):
    """Parts in order, parts after others were written, one scratch for all: the draws are those of the whole."""
    source = torch.randn(entries, generator=torch.Generator().manual_seed(seed))
    kept, rounding.DRAW_ENTRIES = rounding.DRAW_ENTRIES, draw_entries
    try:
        whole = rounded(source)
        rounder, scratch = StochasticRounder(0), Scratch(200, source.device)
        target = torch.empty_like(whole)
        bounds = sorted({0, entries, *(4 * cut for cut in cuts if 4 * cut < entries)})
        for number, (start, stop) in enumerate(pairwise(bounds)):
            scratch.clear()
            if number == 2:
                rounder.write(torch.empty(5, dtype=torch.bfloat16), torch.randn(5), "b/1", 0, scratch)
            rounder.write(target[start:stop], source[start:stop].clone(), "a/1", start, scratch)
    finally:
        rounding.DRAW_ENTRIES = kept
    assert torch.equal(target, whole)


def test_parts_out_of_turn_draw_the_same():
    """After as many entries of another tensor, again after a part was given up, and with one left out."""
    source = torch.randn(256, generator=torch.Generator().manual_seed(5))
    whole, rounder = rounded(source), StochasticRounder(0)

    def write(start, stop, key="a/1"):
        target = torch.empty(stop - start, dtype=torch.bfloat16)
        rounder.write(target, source[start:stop].clone(), key, start)
        return target

    write(0, 64)
    write(0, 64, "b/1")
    for start, stop in ((64, 128), (64, 128), (192, 256), (128, 192)):
        assert torch.equal(write(start, stop), whole[start:stop])
