import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockllm_cli.errors import InputError
from blockllm_cli.optim import stored
from blockllm_cli.optim.adam import AdamRule
from blockllm_cli.optim.blocks import Piece
from blockllm_cli.optim.dense_state import DenseState
from blockllm_cli.optim.entries import Entries
from blockllm_cli.optim.kept_state import KeptState
from blockllm_cli.optim.precision import precision_of

# Multiples of 16 everywhere, whole and kept: the kernel's scalar tail differs from its vector part in the last bit.
SHAPES = {"a": (16, 16), "b": (64,), "c": (16, 8)}
PRECISIONS = [
    ("fp32", "nearest"),
    ("bf16", "nearest"),
    ("bf16", "stochastic"),
    ("bf16_master", "stochastic"),
    ("bf16_papers", "nearest"),
    ("bf16_papers", "stochastic"),
]
RULE = AdamRule(weight_decay=0.1, decoupled=True)


def dtypes(name):
    precision = precision_of(name)
    return precision.weights, precision.accumulator(1)


def drawn(seed, dtype):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in SHAPES.items()}


def rate_of(name):
    return 1e-2 if name == "a" else 3e-3


def made(policy="drop", precision="fp32", rounding="nearest", **keywords):
    state = KeptState(RULE, precision_of(precision, rounding), 7, policy, **keywords)
    weights = drawn(1, dtypes(precision)[0])
    state.attach(weights)
    return state, weights


def positions(shape, seed, share=0.5):
    numel = torch.Size(shape).numel()
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(seed))
    return order[: int(share * numel)].sort().values


def start(state, seed, names=tuple(SHAPES)):
    for name in names:
        state.start(Piece(name, SHAPES[name]), Entries.of(positions(SHAPES[name], seed), SHAPES[name]))


def update(state, step, dtype=torch.float32, **keywords):
    gradients = drawn(100 + step, dtype)
    kept = {record.key: record.entries.gather(gradients[record.piece.parameter]) for record in state.records()}
    kept = {key: value.clone() for key, value in kept.items()}
    return state.update(kept, rate_of, step, **keywords)


@pytest.mark.parametrize(("precision", "rounding"), PRECISIONS)
@pytest.mark.parametrize("slice_entries", [2**21, 50])
def test_whole_pieces_are_the_dense_state_to_the_bit(precision, rounding, slice_entries, monkeypatch):
    monkeypatch.setattr(stored, "SLICE_ENTRIES", slice_entries)
    weight, accumulator = dtypes(precision)
    dense, theirs = DenseState(RULE, precision_of(precision, rounding), 7), drawn(1, weight)
    dense.allocate(theirs)
    state, mine = made(precision=precision, rounding=rounding)
    for name, shape in SHAPES.items():
        state.start(Piece(name, shape), Entries.all(shape))
    for step in range(1, 8):
        wanted = dense.update(drawn(100 + step, accumulator), rate_of, count_unchanged=True)
        found = update(state, step, accumulator, count_unchanged=True)
        assert (wanted is None) == (found is None)
        assert wanted is None or float(wanted) == float(found)
        assert all(torch.equal(mine[name], theirs[name]) for name in SHAPES)
    held = {name.split("@")[0] + name[name.rindex(".") :]: tensor for name, _, tensor in state.held()}
    for name, _, tensor in dense.held():
        assert torch.equal(held[name], tensor.view(-1)), name


@pytest.mark.parametrize(("precision", "rounding"), [each for each in PRECISIONS if each[1] == "nearest"])
@pytest.mark.parametrize("unit", ["entry", "row", "slice"])
def test_kept_entries_are_the_same_entries_of_the_dense_update(precision, rounding, unit):
    weight, accumulator = dtypes(precision)
    dense, theirs = DenseState(RULE, precision_of(precision, rounding), 7), drawn(1, weight)
    dense.allocate(theirs)
    state, mine = made(precision=precision, rounding=rounding)
    flags = {}
    for name, shape in SHAPES.items():
        flags[name] = torch.zeros(shape, dtype=torch.bool)
        if unit == "slice":
            piece = Piece(name, (shape[0] // 4 * 2, *shape[1:]), (shape[0] // 4, shape[0] // 4 * 3))
            state.start(piece, Entries.all(piece.shape))
            flags[name][slice(*piece.rows)] = True
        elif unit == "row":
            rows = torch.arange(shape[0])[::2]
            state.start(Piece(name, shape), Entries.of(rows, shape, "row"))
            flags[name][rows] = True
        else:
            kept = positions(shape, 5)
            state.start(Piece(name, shape), Entries.of(kept, shape))
            flags[name].view(-1)[kept] = True
    before = {name: tensor.clone() for name, tensor in mine.items()}
    for step in range(1, 6):
        gradients = drawn(100 + step, accumulator)
        dense.update({name: value.clone() for name, value in gradients.items()}, rate_of)
        kept = {
            record.key: record.entries.gather(record.piece.of(gradients[record.piece.parameter])).clone()
            for record in state.records()
        }
        state.update(kept, rate_of, step)
    for name, flag in flags.items():
        assert torch.equal(mine[name][flag], theirs[name][flag])
        assert torch.equal(mine[name][~flag], before[name][~flag])


def by_entry(state, slot="exp_avg"):
    """Moment and counter of every entry, NaN and -1 where there is none."""
    found = {}
    for name, shape in SHAPES.items():
        moments, counters = torch.full(shape, float("nan")).view(-1), torch.full(shape, -1).view(-1)
        for record in state.active.get(name, []):
            places = record.entries.units(torch.device("cpu"))
            assert (counters[places] == -1).all(), "an entry stands in two records"
            moments[places] = record.slots[slot].float()
            counters[places] = record.counter
        found[name] = (moments, counters)
    return found


@pytest.mark.parametrize("policy", ["drop", "keep", "offload"])
def test_what_becomes_of_state_when_the_selection_changes(policy):
    state, _ = made(policy)
    start(state, 1)
    for step in (1, 2, 3):
        update(state, step)
    first = by_entry(state)
    for seed, step in ((2, 4), (1, 5)):
        if policy == "drop":
            state.stop(list(SHAPES))
        before = by_entry(state) if seed == 2 else first
        start(state, seed)
        now = by_entry(state)
        for name, shape in SHAPES.items():
            wanted = positions(shape, seed)
            moments, counters = now[name]
            assert (counters[wanted] >= 0).all()
            assert int((counters >= 0).sum()) == len(wanted)
            held = before[name][1] >= 0
            if policy == "keep" and seed == 1:
                second = torch.zeros_like(held)
                second[positions(shape, 2)] = True
                held = held & second  # what left at the second selection has been dropped
            stays = held & (counters >= 0)
            if policy == "drop":
                assert (counters[wanted] == 0).all()
                assert (moments[wanted] == 0).all()
                continue
            assert stays.any()
            fresh = (counters >= 0) & ~stays
            if seed == 2:
                assert torch.equal(moments[stays], before[name][0][stays])
                assert (counters[stays] == 3).all()
                assert (counters[fresh] == 0).all()
            elif policy == "offload":
                apart = stays.clone()
                apart[positions(shape, 2)] = False  # parked in between, so as they were
                assert apart.any()
                assert torch.equal(moments[apart], first[name][0][apart])
                assert (counters[apart] == 3).all()
        update(state, step)


def test_entries_of_equal_counter_share_a_record():
    state, _ = made("keep")
    for step in range(1, 9):
        start(state, step % 2)
        update(state, step)
    for records in state.active.values():
        counters = [record.counter for record in records]
        assert len(set(counters)) == len(counters)


@pytest.mark.parametrize("policy", ["drop", "keep", "offload"])
def test_what_is_held_is_what_is_kept_r17(policy):
    state, _ = made(policy, "bf16_master")
    for step in range(1, 8):
        state.stop(list(SHAPES)) if policy == "drop" else None
        start(state, step)
        update(state, step)
        kept = sum(len(positions(shape, step)) for shape in SHAPES.values())
        assert state.entries == kept
        held = sum(tensor.numel() for name, _, tensor in state.held() if name.endswith(".exp_avg"))
        assert held == state.first_moment_entries
        assert held == kept if policy != "offload" else held >= kept
    assert state.active_entries(["a"]) == len(positions(SHAPES["a"], 1))


def test_dropped_state_is_free_before_the_new_is_made(monkeypatch):
    state, _ = made("drop")
    start(state, 1, ["a"])
    seen = []
    make = KeptState._new

    def watched(self, piece, entries):
        seen.append(sum(tensor.numel() for _, _, tensor in self.held()))
        return make(self, piece, entries)

    monkeypatch.setattr(KeptState, "_new", watched)
    start(state, 2, ["a"])
    assert seen == [0]


def test_master_copies_go_on_for_entries_that_do_and_come_from_the_weight_for_others():
    state, weights = made("keep", "bf16_master")
    start(state, 1)
    for step in range(1, 4):
        update(state, step)
    masters = {name: torch.full(SHAPES[name], float("nan")).view(-1) for name in SHAPES}
    for record in state.records():
        masters[record.piece.parameter][record.entries.positions()] = record.master
    start(state, 2)
    for record in state.records():
        before = masters[record.piece.parameter][record.entries.positions()]
        weight = weights[record.piece.parameter].view(-1)[record.entries.positions()].float()
        assert torch.equal(record.master, before if record.counter else weight)


@pytest.mark.parametrize("weights_move", [False, True])
def test_a_parked_master_copy_is_stale_if_others_write_the_weight(weights_move):
    state, weights = made("offload", "bf16_master", weights_move=weights_move)
    piece = Piece("a", SHAPES["a"])
    state.start(piece, Entries.all(piece.shape))
    update(state, 1)
    before = state.active["a"][0].master.clone()
    state.stop(["a"])
    assert not state.active
    weights["a"].add_(1.0)
    state.start(piece, Entries.all(piece.shape))
    (record,) = state.active["a"]
    assert record.counter == 1
    assert torch.equal(record.master, weights["a"].float().view(-1) if weights_move else before)


def through_disk(state, tmp_path):
    saved = state.state_dict()
    save_file({name: value for name, value in saved.items() if torch.is_tensor(value)}, tmp_path / "state")
    plain = json.loads(json.dumps({name: value for name, value in saved.items() if not torch.is_tensor(value)}))
    return {**load_file(tmp_path / "state"), **plain}


@pytest.mark.parametrize("policy", ["drop", "keep", "offload"])
@pytest.mark.parametrize(("precision", "rounding"), PRECISIONS)
def test_it_goes_on_from_a_checkpoint_to_the_bit(policy, precision, rounding, tmp_path):
    def run(state, steps):
        for step in steps:
            if step % 3 == 1:
                state.stop(["b"])
                start(state, step, ["a", "c"] if step % 2 else list(SHAPES))
            update(state, step, dtypes(precision)[1])

    whole, weights = made(policy, precision, rounding)
    run(whole, range(1, 13))
    cut, mine = made(policy, precision, rounding)
    run(cut, range(1, 9))
    again = KeptState(RULE, precision_of(precision, rounding), 7, policy)
    again.attach(mine)
    again.load_state_dict(through_disk(cut, tmp_path))
    run(again, range(9, 13))
    assert all(torch.equal(weights[name], mine[name]) for name in SHAPES)
    one, other = whole.state_dict(), again.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one if torch.is_tensor(one[name]))
    assert one["records"] == other["records"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, name: state.pop(name), "has no '.*exp_avg'"),
        (lambda state, name: state.update(more=torch.ones(1)), "has 'more'"),
        (lambda state, name: state.update({name: state[name][:-1]}), r"\(127,\) torch.float32, the run needs \(128,\)"),
        (lambda state, name: state.update({name: state[name].double()}), r"torch.float64, the run needs"),
        (lambda state, name: state["records"][0].update(parameter="z"), "model has none such"),
        (lambda state, name: state["records"][0].update(shape=[12, 10]), "model has none such"),
    ],
)
def test_state_of_something_else_is_refused(change, message):
    state, _ = made("keep")
    start(state, 1)
    saved = copy.deepcopy(state.state_dict())
    change(saved, "a@1.exp_avg")
    with pytest.raises(InputError, match=message):
        state.load_state_dict(saved)


def test_weights_it_is_not_for_are_refused():
    state = KeptState(RULE, precision_of("bf16"), 0)
    with pytest.raises(ValueError, match="float32"):
        state.attach({"a": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="strides"):
        state.attach({"a": torch.zeros(3, 4, dtype=torch.bfloat16).t()})
