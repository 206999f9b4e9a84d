from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from blockllm_cli.optim.selection import (
    Norms,
    Patience,
    Visits,
    at_random,
    budget,
    by_falling,
    in_turn,
    next_in_round,
    starting_at,
    take_masked,
    take_whole,
    wave,
)

NAMES = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("candidates", "sparsity", "entries"),
    [(10, 0.9, 1), (10, 0.7, 3), (1000, 0.999, 1), (3136, 0.6, 1254), (10, 0.0, 10), (9, 0.9, 0), (100, 0.29, 71)],
)
def test_the_budget_is_exact_decimal_arithmetic(candidates, sparsity, entries):
    assert budget(candidates, sparsity) == entries


def test_norms_are_read_late_and_the_newest_finite_one_holds():
    norms = Norms()
    norms.note({"a": torch.tensor(1.5), "b": torch.tensor(2.0)}, 3)
    norms.note({"a": torch.tensor(float("nan")), "b": torch.tensor(4.0)}, 4)
    assert norms.read() == {"a": 1.5, "b": 4.0}
    norms.note({"a": torch.tensor(1.0)}, 5)
    norms.read()
    norms.note({"a": torch.tensor(float("inf"))}, 6)
    assert norms.read() == {"a": 1.0, "b": 4.0}
    assert (norms.step_of("a"), norms.step_of("b"), norms.step_of("c")) == (5, 4, None)
    again = Norms()
    again.restore(norms.state())
    assert again.state() == norms.state()


def test_norms_that_the_host_knows_are_as_new_as_any():
    norms = Norms()
    norms.note({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, 1)
    norms.put({"a": 5.0, "b": float("nan")}, 2)
    norms.note({"a": torch.tensor(float("inf"))}, 3)
    assert norms.read() == {"a": 5.0, "b": 2.0}
    assert (norms.step_of("a"), norms.step_of("b")) == (2, 1)


def test_norms_are_read_in_one_transfer_and_do_not_gather_without_end():
    transfers = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.cat.default:
                transfers.append(len(args[0]))
            return function(*args, **(kwargs or {}))

    norms = Norms()
    with Watch():
        for step in range(1, 251):
            norms.note({"a": torch.tensor(float(step)), "b": torch.tensor(1.0)}, step)
        assert transfers == [100, 100]
        assert norms.read() == {"a": 250.0, "b": 1.0}
    assert transfers == [100, 100, 50]


def test_visit_frequency():
    visits = Visits()
    assert visits.frequency("a") == 1.0
    visits.count(["a"])
    visits.count(["a", "b"])
    assert [visits.frequency(name) for name in "abc"] == [1.0, 2 / 3, 1 / 3]


def told(losses, **keywords):
    patience = Patience(**keywords)
    causes = []
    for loss in losses:
        causes.append(patience.cause())
        if causes[-1]:
            patience.clear()
        patience.note(loss)
    return causes


def test_patience_fires_when_the_newest_is_not_below_the_mean():
    assert told([5, 4, 3, 3.6, 3], window=3) == [None, None, None, None, "patience"]  # 3.6 >= (4 + 3 + 3.6) / 3
    assert told([5, 4, 3, 3.5, 3], window=3) == [None] * 4 + ["patience"]  # equal to the mean of 4, 3 and 3.5
    assert told([5, 4, 3, 3.4, 3], window=3) == [None] * 5
    assert told([9 - 0.1 * step for step in range(30)], window=3) == [None] * 30
    assert told([1.0] * 8, window=3) == [None, None, None, "patience", None, None, "patience", None]


def test_intervals_bound_it():
    assert told([1.0] * 9, window=2, min_interval=4) == [None] * 4 + ["patience"] + [None] * 3 + ["patience"]
    falling = [9 - 0.1 * step for step in range(9)]
    assert told(falling, window=2, max_interval=4) == [None] * 4 + ["max_interval"] + [None] * 3 + ["max_interval"]


def test_patience_survives_a_checkpoint_with_its_window_half_full():
    patience = Patience(4)
    for loss in (3.0, 2.0):
        patience.note(loss)
    again = Patience(4)
    again.restore(patience.state())
    assert again == patience


def test_orders():
    assert by_falling({"a": 1.0, "b": 3.0, "c": 3.0}, NAMES) == ["b", "c", "a", "d"]
    assert in_turn(NAMES, None) == NAMES
    assert in_turn(NAMES, "b") == ["c", "d", "a", "b"]
    assert starting_at(NAMES, "b") == ["b", "c", "d", "a"]
    assert starting_at(NAMES, None) == NAMES
    assert at_random(NAMES, 1, 1) == at_random(NAMES, 1, 1)
    assert len({tuple(at_random(NAMES, 1, number)) for number in range(40)}) > 10
    assert sorted(at_random(NAMES, 1, 3)) == NAMES


def test_rounds_go_on_behind_the_last_and_pass_over_the_closed():
    assert next_in_round(NAMES, None, 2, lambda name: name != "a") == ["b", "c"]
    assert next_in_round(NAMES, "c", 2, lambda name: True) == ["d", "a"]
    assert next_in_round(NAMES, "c", 9, lambda name: name != "d") == ["a", "b", "c"]


def test_whole_blocks_that_do_not_fit_are_passed_over():
    sizes = {"a": 5, "b": 4, "c": 2, "d": 1}
    assert take_whole(NAMES, sizes, 8) == ["a", "c", "d"]
    assert take_whole(NAMES, sizes, 0) == []


sizes_of = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 50), min_size=1)


@given(sizes=sizes_of, limit=st.integers(0, 200))
def test_whole_blocks_stay_within_the_budget_and_none_that_fits_is_left(sizes, limit):
    taken = take_whole(list(sizes), sizes, limit)
    left = limit - sum(sizes[name] for name in taken)
    assert left >= 0
    assert all(sizes[name] > left for name in sizes if name not in taken)


@given(sizes=sizes_of, limit=st.integers(1, 200), density=st.sampled_from([0.05, 0.1, 0.3, 0.7, 1.0]))
def test_masked_blocks_stay_within_the_budget(sizes, limit, density):
    taken, share = take_masked(list(sizes), sizes, limit, density, lambda name, z: int(z * sizes[name]))
    assert 0 < share <= Fraction(str(density))
    assert sum(int(share * sizes[name]) for name in taken) <= limit
    assert all(int(share * sizes[name]) > 0 for name in taken)


def test_the_crossing_block_is_included_and_all_keep_the_same_share():
    sizes = {"a": 40, "b": 30, "c": 30}
    taken, share = take_masked(list(sizes), sizes, 50, 1.0, lambda name, z: int(z * sizes[name]))
    assert (taken, share) == (["a", "b"], Fraction(5, 7))
    taken, share = take_masked(list(sizes), sizes, 20, 0.5, lambda name, z: int(z * sizes[name]))
    assert (taken, share) == (["a"], Fraction(1, 2))  # the budget is met, nothing has to cross it
    taken, share = take_masked(list(sizes), sizes, 10, 0.1, lambda name, z: int(z * sizes[name]))
    assert (taken, share) == (["a", "b", "c"], Fraction(1, 10))
    # 0.1 x 30 is 3, not 2.9999
    assert int(share * 30) == 3


def test_waves():
    sizes = {"a": 5, "b": 4, "c": 2, "d": 1}
    assert wave(NAMES, sizes, 9) == ["a", "b"]
    assert wave(["c", "d"], sizes, 9) == ["c", "d"]
    assert wave(NAMES, sizes, 1) == ["a"]
    assert wave([], sizes, 9) == []


def test_blocks_too_small_for_their_share_are_passed_over_in_any_order():
    rows = {"a": 100, "b": 4, "c": 100, "d": 4}
    sizes = {name: 8 * count for name, count in rows.items()}

    def kept(name, share):
        return int(share * rows[name]) * 8

    for order in (NAMES, NAMES[::-1], ["b", "d", "a", "c"]):
        for limit in (8, 16, 24, 100):
            taken, share = take_masked(order, sizes, limit, 0.2, kept)
            assert taken
            assert 0 < sum(kept(name, share) for name in taken) <= limit
    assert take_masked(NAMES, sizes, 7, 0.2, kept) == ([], Fraction(1, 5))
