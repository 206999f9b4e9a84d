"""Learning-rate schedules: corner points, properties, and the recorded multipliers of the papers' trainer."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockllm_cli.training.schedule import Schedule

DECAYING = ("cosine", "linear", "wsd")
OURS = (*DECAYING, "constant")


@pytest.mark.parametrize(
    ("key", "steps", "warmup", "stride"),
    [("cosine.w10_n100", 100, 10, 1), ("cosine.w0_n20", 20, 0, 1), ("cosine.w1000_n10000.every100", 10_000, 1000, 100)],
)
def test_papers_is_the_recorded_schedule_with_its_quirks(golden, key, steps, warmup, stride):
    """Entry k is what update k + 1 uses: 0 at first, 1e-7 (or 1 without warm-up) at update steps + 1."""
    schedule = Schedule("papers", steps, warmup)
    recorded = golden("schedule")[key]
    mine = [schedule.factor(1 + stride * index) for index in range(len(recorded))]
    torch.testing.assert_close(torch.tensor(mine, dtype=torch.float64), recorded, atol=1e-15, rtol=1e-14)
    assert schedule.factor(steps + 1) == (1e-7 if warmup else 1.0)


def test_papers_rates_as_that_trainer_uses_them(golden):
    schedule = Schedule("papers", 100, 10)
    mine = [0.01 * schedule.factor(update) for update in range(1, 102)]
    torch.testing.assert_close(
        torch.tensor(mine, dtype=torch.float64), golden("schedule")["cosine.lr_used_by_update"], atol=1e-17, rtol=1e-14
    )


@pytest.mark.parametrize(("shape", "min_ratio"), [("cosine", 0.1), ("linear", 0.0)])
def test_ours_is_the_recorded_one_read_one_update_earlier(golden, shape, min_ratio):
    """Entry k belongs to our update k: no update at rate 0, and the end is reached at the last one."""
    schedule = Schedule(shape, 100, 10, min_ratio)
    recorded = golden("schedule")[f"{shape}.lr_used_by_update"]
    mine = torch.tensor([0.01 * schedule.factor(update) for update in range(1, 101)], dtype=torch.float64)
    end = 99 if shape == "cosine" else 100  # the recorded cosine has 1e-7 there
    torch.testing.assert_close(mine[:end], recorded[1 : end + 1], atol=1e-17, rtol=1e-13)
    assert mine[-1] == 0.01 * min_ratio


@pytest.mark.parametrize("shape", OURS)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (7, 0), (7, 7), (7, 6), (10, 1), (10, 9), (100, 10)])
def test_corner_points(shape, steps, warmup):
    schedule = Schedule(shape, steps, warmup, 0.1)
    factors = [schedule.factor(step) for step in range(1, steps + 1)]
    assert all(0.0 < factor <= 1.0 for factor in factors)
    assert factors[:warmup] == [step / warmup for step in range(1, warmup + 1)]
    if warmup == steps or shape == "constant":
        assert factors[-1] == 1.0
    else:
        assert factors[-1] == 0.1
    if warmup == 0 and steps > 1 and shape != "constant":
        assert 0.8 < factors[0] <= 1.0


@settings(deadline=None)
@given(
    st.sampled_from(OURS),
    st.integers(1, 400).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(0, steps))),
    st.floats(0.0, 1.0),
)
def test_rises_to_the_peak_then_never_rises_and_ends_exactly(shape, lengths, min_ratio):
    steps, warmup = lengths
    schedule = Schedule(shape, steps, warmup, min_ratio)
    factors = [schedule.factor(step) for step in range(1, steps + 1)]
    up, down = factors[:warmup], factors[max(0, warmup - 1) :]
    assert up == sorted(up)
    assert all(after <= before + 1e-15 for before, after in pairwise(down))
    assert all(min_ratio - 1e-15 <= factor <= 1.0 for factor in factors[warmup:])
    if warmup:
        assert factors[warmup - 1] == 1.0
    if warmup < steps and shape != "constant":
        assert factors[-1] == min_ratio


def test_half_way_values():
    assert Schedule("cosine", 110, 10, 0.1).factor(60) == pytest.approx(0.55)
    assert Schedule("cosine", 110, 10, 0.0).factor(35) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))
    assert Schedule("linear", 110, 10, 0.1).factor(60) == pytest.approx(0.55)
    assert Schedule("linear", 110, 10, 0.0).factor(35) == pytest.approx(0.75)


def test_wsd_is_flat_and_decays_over_the_last_fifth():
    schedule = Schedule("wsd", 100, 10, 0.1)
    factors = {step: schedule.factor(step) for step in range(1, 101)}
    assert {factors[step] for step in range(10, 81)} == {1.0}
    assert factors[81] < 1.0
    assert factors[85] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(5 / 20)))
    assert factors[100] == 0.1


def test_wsd_decay_begins_after_a_long_warmup():
    schedule = Schedule("wsd", 100, 90, 0.0)
    assert schedule.factor(90) == 1.0
    assert schedule.factor(91) == pytest.approx(1 - math.sqrt(0.1))
    assert schedule.factor(100) == 0.0


@pytest.mark.parametrize("arguments", [(0, 0, 0.1), (10, 11, 0.1), (10, -1, 0.1), (10, 1, -0.1), (10, 1, 1.5)])
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="a schedule needs"):
        Schedule("cosine", *arguments)
