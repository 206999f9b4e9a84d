"""What becomes of state as selections change, held against a model that goes entry by entry; what an update asks."""

import json
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from blockllm_cli.errors import InputError
from blockllm_cli.optim import bitmap
from blockllm_cli.optim.adam import AdamRule
from blockllm_cli.optim.blocks import Piece
from blockllm_cli.optim.dense_state import DenseState
from blockllm_cli.optim.entries import Entries
from blockllm_cli.optim.kept_state import KeptState
from blockllm_cli.optim.precision import precision_of

SHAPES = {"a": (50, 33), "b": (7,), "c": (129, 3)}
RULE = AdamRule(weight_decay=0.1, decoupled=True)
PRECISIONS = ("fp32", "bf16", "bf16_master", "bf16_papers")


def rate_of(name):
    return {"a": 1e-2, "b": 3e-3, "c": 1e-2}[name]


def weights_of(precision):
    draw = torch.Generator().manual_seed(9)
    return {name: torch.randn(shape, generator=draw).to(precision.weights) for name, shape in SHAPES.items()}


def made(name="fp32", rounding="nearest", policy="drop", **keywords):
    precision = precision_of(name, rounding)
    state, weights = KeptState(RULE, precision, 0, policy, **keywords), weights_of(precision)
    state.attach(weights)
    return state, weights


def gradients(step, dtype=torch.float32):
    draw = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in SHAPES.items()}


def piece(name, rows=None):
    shape = SHAPES[name] if rows is None else (rows[1] - rows[0], *SHAPES[name][1:])
    return Piece(name, shape, rows)


def picked(name, share, seed=0, unit="entry"):
    units = torch.Size(SHAPES[name]).numel() if unit == "entry" else SHAPES[name][0]
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    return Entries.of(order[: int(share * units)].sort().values, SHAPES[name], unit)


def feed(state, step, dtype=torch.float32, **keywords):
    grads = gradients(step, dtype)
    routed = {
        record.key: record.entries.gather(record.piece.of(grads[record.piece.parameter])).clone()
        for record in state.records()
    }
    return state.update(routed, rate_of, step, **keywords)


def test_row_slices_are_updated_in_place_each_with_its_own_counter():
    state, weights = made()
    dense, dense_weights = DenseState(RULE, precision_of("fp32"), 0), weights_of(precision_of("fp32"))
    dense.allocate(dense_weights)
    for step in range(1, 4):
        if step == 1:
            state.start(piece("a", (0, 20)), Entries.all((20, 33)))
        if step == 2:
            state.start(piece("a", (20, 50)), Entries.all((30, 33)))
        feed(state, step)
        dense.update({"a": gradients(step)["a"]}, rate_of)
    assert [record.counter for record in state.records()] == [3, 2]
    assert torch.equal(weights["a"][:20], dense_weights["a"][:20])
    assert not torch.equal(weights["a"][20:], dense_weights["a"][20:])
    (first, second) = state.records()
    assert (first.piece.key, second.piece.key) == ("a@0:20", "a@20:50")
    assert first.key.startswith("a@0:20@")


def test_one_call_of_the_rule_serves_all_records_of_one_rate_and_counter():
    calls = []

    class Watched(AdamRule):
        def apply(self, weights, gradients, slots, *, step, lr):
            calls.append((lr, step, len(weights)))
            super().apply(weights, gradients, slots, step=step, lr=lr)

    state = KeptState(Watched(), precision_of("fp32"), 0)
    state.attach(weights_of(precision_of("fp32")))
    state.start(piece("a"), picked("a", 0.3))
    state.start(piece("b"), Entries.all((7,)))
    feed(state, 1)
    state.start(piece("c", (0, 9)), Entries.all((9, 3)))
    state.start(piece("c", (9, 20)), Entries.all((11, 3)))
    calls.clear()
    feed(state, 2)
    assert calls == [(1e-2, 2, 1), (3e-3, 2, 1), (1e-2, 1, 2)]


def test_a_record_without_gradient_rests():
    state, weights = made()
    for each in "ab":
        state.start(piece(each), picked(each, 0.5))
    feed(state, 1)
    first, second = state.records()
    before = weights["b"].clone(), {slot: values.clone() for slot, values in second.slots.items()}
    state.update({first.key: first.entries.gather(gradients(2)["a"])}, rate_of, 2)
    assert (first.counter, second.counter) == (2, 1)
    assert torch.equal(weights["b"], before[0])
    assert all(torch.equal(values, before[1][slot]) for slot, values in second.slots.items())


@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16_master"])
def test_an_update_never_waits_for_the_device(name, monkeypatch):
    """No operation of it hands a value or a size back to the host, where tensors are not on the host."""
    monkeypatch.setattr(bitmap, "is_on_host", lambda tensor: False)
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function)
            return function(*args, **(kwargs or {}))

    state, _ = made(name)
    state.start(piece("a"), picked("a", 0.3))
    state.start(piece("b"), Entries.of(torch.tensor([2]), (7,)))
    state.start(piece("c"), picked("c", 0.3, unit="row"))
    routed = {record.key: torch.ones(record.entries.count) for record in state.records()}
    with Watch():
        state.update(routed, rate_of, 1, count_unchanged=True)
    assert torch.ops.aten.nonzero_static.default in seen
    waits = {torch.ops.aten._local_scalar_dense.default}
    assert not [each for each in seen if each in waits or torch.Tag.dynamic_output_shape in each.tags]


def test_a_new_start_with_drop_is_from_zero_whatever_was_held():
    state, _ = made()
    entries = picked("a", 0.3)
    state.start(piece("a"), entries)
    feed(state, 1)
    (before,) = state.records()
    state.start(piece("a"), entries)
    (record,) = state.records()
    assert record.counter == 0
    assert not any(values.any() for values in record.slots.values())
    assert record.serial != before.serial
    state.stop(["a", "never started"])
    assert not [*state.records()]
    assert state.entries == state.first_moment_entries == 0


@pytest.mark.parametrize(("policy", "records"), [("drop", 1), ("keep", 2), ("offload", 2)])
def test_the_state_of_before_is_free_when_that_of_now_is_made(policy, records, monkeypatch):
    """With "drop" nothing is held twice; else what goes on is while a piece is divided, and not three times."""
    state, _ = made("bf16_master", policy=policy)
    state.start(piece("a"), picked("a", 0.3))
    feed(state, 1)
    old = [weakref.ref(tensor) for record in state.records() for tensor in (*record.slots.values(), record.master)]
    seen = []
    for name in ("_record", "_new"):
        make = getattr(state, name)
        monkeypatch.setattr(
            state, name, lambda *given, make=make: (seen.append([ref() for ref in old]), make(*given))[1]
        )
    state.start(piece("a"), picked("a", 0.3, seed=1))
    assert seen == [[None] * 3] * records


class OneByOne:
    """What each policy means, entry by entry in float64: a counter and two moments for every entry that has state."""

    def __init__(self, weight, policy):
        self.weight, self.policy = weight.double().view(-1).clone(), policy
        self.count = torch.zeros(self.weight.numel())
        self.moments = torch.zeros(2, self.weight.numel(), dtype=torch.float64)
        self.kept = torch.zeros(self.weight.numel(), dtype=torch.bool)

    def start(self, kept):
        forget = {"drop": torch.ones_like(kept), "keep": ~(kept & self.kept), "offload": torch.zeros_like(kept)}
        self.count[forget[self.policy]] = 0
        self.moments[:, forget[self.policy]] = 0
        self.kept = kept

    def update(self, gradient, lr):
        k, g = self.kept, gradient.double().view(-1)
        self.count[k] += 1
        for moment, beta, value in zip(self.moments, RULE.betas, (g, g * g), strict=True):
            moment[k] = beta * moment[k] + (1 - beta) * value[k]
        first, second = (m[k] / (1 - b ** self.count[k]) for m, b in zip(self.moments, RULE.betas, strict=True))
        self.weight[k] -= lr * RULE.weight_decay * self.weight[k]
        self.weight[k] -= lr * first / (second.sqrt() + RULE.eps)


changes = st.lists(
    st.tuples(st.sampled_from([0.0, 0.05, 0.3, 0.6, 1.0]), st.integers(0, 5), st.sampled_from(["entry", "row"])),
    min_size=2,
    max_size=6,
)


@settings(max_examples=80, deadline=None)
@given(changes=changes, policy=st.sampled_from(["drop", "keep", "offload"]))
def test_every_policy_does_what_it_means_entry_by_entry(changes, policy):
    """Masks of all forms and both units after one another, two updates each; a share of 0 is a pause."""
    state, weights = made(policy=policy)
    model = OneByOne(weights["c"], policy)
    for number, (share, seed, unit) in enumerate(changes):
        entries = Entries.all(SHAPES["c"]) if share == 1 else picked("c", share, seed, unit)
        flags = torch.zeros(SHAPES["c"])
        if share == 0:
            state.stop(["c"])
        else:
            state.start(piece("c"), entries)
            entries.scatter_(flags, torch.ones(entries.count))
        model.start(flags.view(-1).bool())
        assert state.entries == int(flags.sum())
        for step in (2 * number + 1, 2 * number + 2):
            feed(state, step)
            model.update(gradients(step)["c"], rate_of("c"))
        torch.testing.assert_close(weights["c"].view(-1), model.weight.float(), atol=2e-6, rtol=1e-5)
        for record in state.records():
            places = record.entries.units(torch.device("cpu"), "entry")
            assert (model.count[places] == record.counter).all()
            for values, wanted in zip(record.slots.values(), model.moments, strict=True):
                torch.testing.assert_close(values, wanted[places].float(), atol=1e-6, rtol=1e-5)
    held = {"drop": state.entries, "keep": state.entries, "offload": int((model.count > 0).sum())}
    assert state.first_moment_entries == held[policy]
    moments = [tensor for _, category, tensor in state.held() if category == "optimizer_state"]
    assert sum(tensor.numel() for tensor in moments) == 2 * held[policy]


@pytest.mark.parametrize("unit", ["entry", "row"])
def test_what_comes_back_from_host_memory_is_what_left_to_the_bit(unit):
    state, _ = made("bf16_master", policy="offload")
    entries = picked("c", 0.4, unit=unit)
    state.start(piece("c"), entries)
    feed(state, 1)
    (record,) = state.records()
    left = {slot: values.clone() for slot, values in record.slots.items()} | {"master": record.master.clone()}
    state.stop(["c"])
    assert not [*state.records()]
    assert {tensor.device.type for _, _, tensor in state.held()} == {"cpu"}
    state.start(piece("c"), entries)
    (record,) = state.records()
    assert record.counter == 1
    assert all(torch.equal({**record.slots, "master": record.master}[name], values) for name, values in left.items())
    assert not state.parked


def grown(name, policy):
    """A state with records of several counters, row slices, all forms, and with "offload" something that waits."""
    state, weights = made(name, "stochastic", policy)
    state.start(piece("a"), picked("a", 0.3))
    state.start(piece("b"), Entries.all((7,)))
    state.start(piece("c", (0, 60)), Entries.of(torch.arange(0, 60, 3), (60, 3), "row"))
    feed(state, 1)
    state.start(piece("a"), picked("a", 0.02, seed=1))
    state.stop(["c@0:60"])
    state.start(piece("c", (60, 129)), Entries.all((69, 3)))
    feed(state, 2)
    return state, weights


def go_on(state):
    for step in (3, 4):
        feed(state, step)
    state.start(piece("a"), picked("a", 0.4, seed=2))
    state.start(piece("c", (0, 60)), Entries.of(torch.arange(0, 60, 2), (60, 3), "row"))
    for step in (5, 6):
        feed(state, step)


def through_a_file(state):
    tensors = {key: value.clone() for key, value in state.state_dict().items() if torch.is_tensor(value)}
    plain = {key: value for key, value in state.state_dict().items() if not torch.is_tensor(value)}
    return {**tensors, **json.loads(json.dumps(plain))}


@pytest.mark.parametrize("policy", ["drop", "keep", "offload"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_a_restored_state_goes_on_to_the_bit(name, policy):
    state, weights = grown(name, policy)
    saved = through_a_file(state)
    precision = precision_of(name, "stochastic")
    again = KeptState(RULE, precision, 0, policy)
    others = {key: value.clone() for key, value in weights.items()}
    again.attach(others)
    again.load_state_dict(saved)
    go_on(state)
    go_on(again)
    for each in SHAPES:
        assert torch.equal(weights[each], others[each])
    one, other = state.state_dict(), again.state_dict()
    assert one.keys() == other.keys()
    assert all(
        torch.equal(one[key], other[key]) if torch.is_tensor(one[key]) else one[key] == other[key] for key in one
    )


def test_a_restored_state_shares_no_memory_with_what_was_read():
    state, _ = grown("bf16_master", "offload")
    saved = through_a_file(state)
    state.load_state_dict(saved)
    theirs = {value.untyped_storage().data_ptr() for value in saved.values() if torch.is_tensor(value) and len(value)}
    assert not theirs & {tensor.untyped_storage().data_ptr() for _, _, tensor in state.held()}


def broken(saved, key, value):
    changed = {**saved, key: value}
    return {name: each for name, each in changed.items() if each is not None}


@pytest.mark.parametrize(
    ("end", "value", "message"),
    [
        (".exp_avg", None, "has no '{key}'"),
        (
            ".exp_avg",
            torch.zeros(3),
            r"{key}: the state to load is \(3,\) torch.float32, the run needs \(.*\) torch.fl",
        ),
        (".master", torch.zeros(7).bfloat16(), r"{key}: the state to load is .*bfloat16, the run needs .*float32"),
        (".index", None, "has no '{key}'"),
        (".index", torch.zeros(2, dtype=torch.uint8), r"{key}: the state to load is \(2,\) torch.uint8, the run needs"),
        ("@parked.exp_avg_sq", torch.zeros(2, 3), r"{key}: the state to load is \(2, 3\)"),
        ("@parked.counters", torch.zeros(2), r"{key}: the state to load is \(2,\)"),
        ("records", None, "has no 'records'"),
        ("extra", torch.zeros(3), "has 'extra', which this method does not hold"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(end, value, message):
    state, _ = grown("bf16_master", "offload")
    saved = through_a_file(state)
    key = next((name for name in saved if name.endswith(end)), end)
    with pytest.raises(InputError, match=message.format(key=key)):
        state.load_state_dict(broken(saved, key, value))


def test_every_tensor_is_held_once_under_its_category():
    state, _ = grown("bf16_master", "offload")
    held = [*state.held()]
    assert len({name for name, _, _ in held}) == len(held) == len({id(tensor) for _, _, tensor in held})
    by_category = {}
    for _, category, tensor in held:
        by_category[category] = by_category.get(category, 0) + tensor.nbytes
    assert by_category["optimizer_state"] == 2 * 4 * state.first_moment_entries
    assert by_category["master_weights"] == 4 * state.first_moment_entries
    assert by_category["indices"] > sum(record.entries.bytes for record in state.records())
    assert state.active_entries(["b", "c@60:129"]) == 7 + 69 * 3


@pytest.mark.parametrize("policy", ["keep", "offload"])
def test_a_whole_piece_that_is_kept_by_rows_goes_on_with_these_rows(policy):
    """Units are rows here, whichever came first, so that a matrix takes as many numbers as it has rows."""
    state, _ = made(policy=policy)
    rows = torch.arange(0, 129, 2)
    state.start(piece("c"), Entries.all(SHAPES["c"]))
    feed(state, 1)
    (whole,) = state.records()
    moments = {slot: values.view(129, 3).clone() for slot, values in whole.slots.items()}
    state.start(piece("c"), Entries.of(rows, SHAPES["c"], "row"))
    (record,) = state.records()
    assert (record.counter, record.entries.unit) == (1, "row")
    assert all(torch.equal(record.slots[slot].view(-1, 3), moments[slot][rows]) for slot in moments)
    state.start(piece("c"), Entries.all(SHAPES["c"]))
    assert sum(record.entries.count for record in state.records()) == 129 * 3
    if policy == "offload":
        assert [(record.counter, record.entries.is_all) for record in state.records()] == [(1, True)]
        state.stop(["c"])
        assert state.parked["c"].units.numel() == 129


def test_a_gradient_of_another_size_is_refused():
    """The kernel would read past its end."""
    state, _ = made()
    state.start(piece("a"), picked("a", 0.3))
    (record,) = state.records()
    with pytest.raises(ValueError, match=f"{record.key} has 495 entries, its gradient 494"):
        state.update({record.key: torch.ones(494)}, rate_of, 1)
