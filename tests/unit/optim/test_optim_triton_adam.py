"""The kernel in Triton's interpreter, against torch's kernel.

Sizes of what the latter updates are multiples of 16, or padded to it: its scalar tail differs from its vector part.
"""

import gc
import hashlib
import weakref

import numpy as np
import pytest
import torch

from blockllm_cli.optim.adam import AdamRule, adam_step
from blockllm_cli.optim.blocks import Piece
from blockllm_cli.optim.dense_state import DenseState
from blockllm_cli.optim.entries import Entries
from blockllm_cli.optim.kept_state import KeptState
from blockllm_cli.optim.precision import precision_of
from blockllm_cli.optim.triton_adam import Target, TritonAdam, why_no_triton
from support.interpreted import interpret, interpreted_kernels, needs_triton, philox, rounded_by

pytestmark = needs_triton

PRECISIONS = ["fp32", "bf16", "bf16_master", "bf16_papers"]
RULE = AdamRule(weight_decay=0.1, decoupled=True)
BLOCK = 128
SHAPE = (16, 24)
SIZE = 384


@pytest.fixture(scope="module")
def kernels():
    with pytest.MonkeyPatch.context() as patch:
        yield interpreted_kernels(patch)


def some(count, seed, of=SIZE, also=()):
    order = torch.randperm(of, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [*also, *(each for each in order if each not in also)]
    return torch.tensor(sorted(chosen[:count]))


# The least and the last position are among the single ones; 8 of 384 are less than a bit each.
PIECES = {
    "whole": (Piece("whole", SHAPE), Entries.all(SHAPE)),
    "norm": (Piece("norm", (80,)), Entries.all((80,))),
    "slice": (Piece("slice", (6, 24), (4, 10)), Entries.all((6, 24))),
    "list": (Piece("list", (64, 24)), Entries.of(some(32, 1, 1536, (0, 1535)), (64, 24))),
    "bitmap": (Piece("bitmap", SHAPE), Entries.of(some(208, 2, also=(0, 383)), SHAPE)),
    "rows": (Piece("rows", SHAPE), Entries.of(torch.tensor([0, 3, 4, 9, 10, 15]), SHAPE, "row")),
    "row list": (Piece("row list", (64, 24)), Entries.of(torch.tensor([0, 63]), (64, 24), "row")),
}
PARAMETERS = {name: (16, 24) if name == "slice" else piece.shape for name, (piece, _) in PIECES.items()}


def test_the_pieces_have_every_form():
    forms = {name: (entries.form, entries.unit) for name, (_, entries) in PIECES.items()}
    assert forms["list"] == ("int32", "entry")
    assert forms["bitmap"] == ("bitmap", "entry")
    assert forms["rows"] == ("bitmap", "row")
    assert forms["row list"] == ("int32", "row")


def drawn(seed, dtype, shapes=PARAMETERS):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def rate_of(name):
    return 1e-2 if name in ("whole", "list") else 3e-3


def made(rule=RULE, precision="fp32", rounding="nearest", seed=7, policy="drop", pieces=PIECES):
    state = KeptState(rule, precision_of(precision, rounding), seed, policy)
    weights = drawn(1, state._precision.weights)
    state.attach(weights)
    for piece, entries in pieces.values():
        state.start(piece, entries)
    return state, weights


def update(state, step, names=None, **keywords):
    gradients = drawn(100 + step, state._precision.accumulator(1))
    kept = {
        record.key: record.entries.gather(record.piece.of(gradients[record.piece.parameter])).clone()
        for record in state.records()
        if names is None or record.piece.parameter in names
    }
    return state.update(kept, rate_of, step, **keywords)


def equal(states, others):
    (mine, my_weights), (theirs, their_weights) = states, others
    for name, weight in their_weights.items():
        assert torch.equal(my_weights[name], weight), name
    held = {name: tensor for name, _, tensor in theirs.held()}
    for name, _, tensor in mine.held():
        assert torch.equal(tensor, held[name]), name


@pytest.mark.parametrize(
    ("precision", "rule"),
    [
        *((precision, RULE) for precision in PRECISIONS),
        ("fp32", AdamRule((0.3, 0.99), 1e-3, 0.05, decoupled=False)),
        ("bf16", AdamRule()),
    ],
)
def test_updates_are_those_of_torchs_kernel_to_the_bit(kernels, precision, rule, monkeypatch):
    theirs = made(rule, precision)
    interpret(monkeypatch, kernels, BLOCK)
    mine = made(rule, precision)
    before = {name: weight.clone() for name, weight in mine[1].items()}
    # The counters come to differ: some records have no gradient in the first update.
    for step, names in ((1, ("whole", "list", "bitmap", "row list")), (2, None)):
        wanted = update(theirs[0], step, names, count_unchanged=step == 2)
        found = update(mine[0], step, names, count_unchanged=step == 2)
        assert (wanted is None) == (found is None)
        assert wanted is None or float(found) == pytest.approx(float(wanted), abs=1e-6)
        equal(mine, theirs)
    for name, (piece, entries) in PIECES.items():
        kept = torch.zeros(piece.shape, dtype=torch.bool)
        entries.scatter_(kept, torch.ones(entries.count, dtype=torch.bool))
        everywhere = torch.zeros(PARAMETERS[name], dtype=torch.bool)
        piece.of(everywhere).copy_(kept)
        assert torch.equal(mine[1][name][~everywhere], before[name][~everywhere]), name
        assert not torch.equal(mine[1][name], before[name]), name


@pytest.mark.parametrize("size", [1, 127, 128, 129, 1025])
@pytest.mark.parametrize("form", ["all", "list", "bitmap"])
def test_sizes_that_are_no_multiple_of_a_tile(kernels, size, form):
    numel = {"all": size, "list": 64 * size, "bitmap": 2 * size}[form]
    ends = (0, numel - 1)[: min(size, 2)]
    entries = Entries.all((numel,)) if form == "all" else Entries.of(some(size, 3, numel, ends), (numel,))
    draw = torch.Generator().manual_seed(size)
    # Nothing of the neighbours is touched, and the piece begins where no wide load may.
    around = torch.randn(numel + 8, generator=draw)
    weight, former = around[3 : 3 + numel], around.clone()
    weights, gradient, exp_avg = (torch.randn(size + 16, generator=draw) for _ in range(3))
    exp_avg_sq = torch.rand(size + 16, generator=draw)
    entries.scatter_(weight, weights[:size])
    target = Target("w", 0, weight, entries, (exp_avg[:size].clone(), exp_avg_sq[:size].clone()), None)
    adam = TritonAdam(RULE, precision_of("fp32"), 0, kernels=kernels, block=BLOCK)
    adam.update([target], [gradient[:size]], [(1e-2, 4)], 4)
    padded = [each[: -(-size // 16) * 16].clone() for each in (weights, gradient, exp_avg, exp_avg_sq)]
    adam_step(
        *([each] for each in padded), step=4, lr=1e-2, betas=RULE.betas, eps=RULE.eps, weight_decay=0.1, decoupled=True
    )
    assert torch.equal(entries.gather(weight), padded[0][:size])
    assert torch.equal(target.slots[0], padded[2][:size])
    assert torch.equal(target.slots[1], padded[3][:size])
    entries.scatter_(weight, entries.gather(former[3 : 3 + numel]))
    assert torch.equal(around, former)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_special_values_are_rounded_as_torch_rounds(kernels, rounding):
    values = [float("inf"), -float("inf"), float("nan"), -0.0, 1e-40, 2.0**-133, 1.0, -1.5]
    nearest = [3.4e38, -3.4e38, 1 + 2**-8, 1 + 3 * 2**-8, 1e-41] if rounding == "nearest" else []
    master = torch.tensor(values + nearest)
    wanted = master.to(torch.bfloat16)
    if rounding == "stochastic":  # to either neighbour
        wanted[4] = 0
    size = master.numel()
    target = Target(
        "w",
        0,
        torch.zeros(size, dtype=torch.bfloat16),
        Entries.all((size,)),
        (torch.zeros(size), torch.zeros(size)),
        master,
    )
    precision = precision_of("bf16_master", rounding)
    adam = TritonAdam(AdamRule(), precision, 0, kernels=kernels, block=8)
    adam.update([target], [torch.zeros(size)], [(1e-2, 1)], 1)
    found = target.weight.clone()
    if rounding == "stochastic":
        assert abs(float(found[4])) <= 2.0**-132
        found[4] = 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def key_of(seed, parameter):
    digest = hashlib.blake2b(f"{seed}/{parameter}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def test_the_reference_is_philox():
    zeros, ones = np.zeros((4, 1)), np.full((4, 1), 2**32 - 1)
    as_hex = [[f"{int(word[0]):08x}" for word in philox(*case)] for case in ((zeros, (0, 0), 10), (zeros, (0, 0), 7))]
    assert as_hex[0] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert as_hex[1] == ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]
    last = philox(ones, (2**32 - 1, 2**32 - 1), 10)
    assert [f"{int(word[0]):08x}" for word in last] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def test_stochastic_rounding_draws_from_seed_parameter_update_and_position(kernels, monkeypatch):
    exact = made(precision="bf16_master")
    interpret(monkeypatch, kernels, BLOCK)
    state, _ = made(precision="bf16_master", rounding="stochastic")
    update(exact[0], 5)
    update(state, 5)
    for record, unrounded in zip(state.records(), exact[0].records(), strict=True):
        assert torch.equal(record.master, unrounded.master)
        piece = record.piece
        shape = PARAMETERS[piece.parameter]
        where = record.entries.gather(piece.of(torch.arange(torch.Size(shape).numel()).view(shape)))
        counter = np.zeros((4, where.numel()))
        counter[0], counter[2] = where, 5
        draws = philox(counter, key_of(7, piece.parameter), 7)
        assert torch.equal(record.entries.gather(state.weight(piece)), rounded_by(draws[0], record.master)), record.key


@pytest.mark.parametrize("precision", ["bf16", "bf16_papers"])
def test_draws_do_not_depend_on_tiles_pieces_or_how_entries_are_named(kernels, precision, monkeypatch):
    found = []
    keep = torch.cat([some(200, 5, 288, also=(0,)), torch.arange(288, 384)])  # less than all, the last rows whole
    cuts = [
        (64, [(Piece("whole", SHAPE), Entries.all(SHAPE))]),
        (128, [(Piece("whole", SHAPE), Entries.all(SHAPE))]),
        (32, [(Piece("whole", SHAPE), Entries.of(keep, SHAPE))]),
        (
            64,
            [
                (Piece("whole", (12, 24), (0, 12)), Entries.of(keep[keep < 288], (12, 24))),
                (Piece("whole", (4, 24), (12, 16)), Entries.of(torch.arange(0, 4), (4, 24), "row")),
            ],
        ),
    ]
    for block, pieces in cuts:
        interpret(monkeypatch, kernels, block)
        state, weights = made(precision=precision, rounding="stochastic", pieces=dict(enumerate(pieces)))
        for step in (1, 2):
            update(state, step)
        found.append(weights["whole"].view(-1)[keep])
        moments = torch.zeros(SHAPE)
        for record in state.records():
            record.entries.scatter_(record.piece.of(moments), record.slots["exp_avg_sq"].float())
        found.append(moments.view(-1)[keep])
    for weight, moment in zip(found[2::2], found[3::2], strict=True):
        assert torch.equal(weight, found[0])
        assert torch.equal(moment, found[1])


def test_stochastic_rounding_is_unbiased_and_another_in_every_update(kernels):
    # From 1, where values below are 2**-8 apart, each goes down by 2**-10: a quarter of the entries fall.
    results = []
    for draw, seed in ((1, 0), (1, 0), (2, 0), (1, 1)):
        weight, size = torch.ones(8192, dtype=torch.bfloat16), 8192
        target = Target("w", 0, weight, Entries.all((size,)), (torch.zeros(size), torch.zeros(size)), None)
        precision = precision_of("bf16", "stochastic")
        adam = TritonAdam(AdamRule(), precision, seed, kernels=kernels, block=4096)
        adam.update([target], [torch.ones(size)], [(2.0**-10, 1)], draw)
        assert set(weight.tolist()) == {1.0, 1 - 2**-8}
        results.append(weight)
        fallen = float((weight < 1).float().mean())
        assert abs(fallen - 0.25) < 4 * (0.25 * 0.75 / size) ** 0.5
    assert torch.equal(results[0], results[1])
    for other in results[2:]:
        both = float(((results[0] < 1) & (other < 1)).float().mean())
        assert abs(both - 0.0625) < 4 * (0.0625 * 0.9375 / 8192) ** 0.5


@pytest.mark.parametrize(("precision", "rounding"), [("bf16", "stochastic"), ("bf16_papers", "stochastic")])
def test_whole_pieces_are_the_dense_state_to_the_bit(kernels, precision, rounding, monkeypatch):
    interpret(monkeypatch, kernels, BLOCK)
    names = {name: PIECES[name] for name in ("whole", "norm")}
    state, mine = made(precision=precision, rounding=rounding, pieces=names)
    dense = DenseState(RULE, precision_of(precision, rounding), 7)
    theirs = {name: weight for name, weight in drawn(1, torch.bfloat16).items() if name in names}
    dense.allocate(theirs)
    for step in (1, 2, 3):
        found = update(state, step, count_unchanged=True)
        gradients = drawn(100 + step, state._precision.accumulator(1))
        wanted = dense.update({name: gradients[name] for name in names}, rate_of, count_unchanged=True)
        assert float(found) == float(wanted)
        assert all(torch.equal(mine[name], weight) for name, weight in theirs.items())
    held = {name.split("@")[0] + name[name.rindex(".") :]: tensor for name, _, tensor in state.held()}
    for name, _, tensor in dense.held():
        assert torch.equal(held[name], tensor.view(-1)), name


def test_it_goes_on_from_a_checkpoint_to_the_bit(kernels, monkeypatch):
    interpret(monkeypatch, kernels, BLOCK)
    whole, cut = (made(precision="bf16", rounding="stochastic") for _ in range(2))
    for step in (1, 2):
        update(whole[0], step)
    update(cut[0], 1)
    saved = {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in cut[0].state_dict().items()
    }
    resumed = KeptState(RULE, precision_of("bf16", "stochastic"), 7)
    resumed.attach(cut[1])
    resumed.load_state_dict(saved)
    update(resumed, 2)
    equal((resumed, cut[1]), whole)


def test_a_new_selection_is_taken_up_and_the_old_one_is_free(kernels, monkeypatch):
    theirs = made(policy="keep")
    interpret(monkeypatch, kernels, BLOCK)
    mine = made(policy="keep")
    update(theirs[0], 1)
    update(mine[0], 1)
    old = weakref.ref(next(iter(mine[0].active["list"])).slots["exp_avg"])
    for state, _ in (mine, theirs):
        state.stop(["list", "norm"])
        # Some entries go on, others start: two records, with a counter each.
        state.start(PIECES["bitmap"][0], Entries.of(some(208, 9, also=tuple(range(0, 96, 2))), SHAPE))
    gc.collect()
    assert old() is None
    assert len(mine[0].active["bitmap"]) == 2
    sizes = [record.entries.count for record in mine[0].active["bitmap"]]
    assert sum(sizes) == 208
    for step in (2, 3):
        update(theirs[0], step)
        update(mine[0], step)
    close = {name: tensor for name, _, tensor in theirs[0].held()}
    for name, _, tensor in mine[0].held():
        # These records have no multiples of 16.
        torch.testing.assert_close(tensor, close[name], rtol=3e-7, atol=1e-9)


class Counting:
    """The kernels, with their launches counted and the tables of each kept."""

    def __init__(self, kernels):
        self.tl, self.grids, self.tables = kernels.tl, [], []

        def launched(grid):
            def launch(records, *arguments, **keywords):
                self.grids.append(grid)
                self.tables.append(records)
                kernels.update_entries[grid](records, *arguments, **keywords)

            return launch

        self.update_entries = _Indexed(launched)


class _Indexed:
    def __init__(self, get):
        self._get = get

    def __getitem__(self, grid):
        return self._get(grid)


@pytest.mark.parametrize("records", [1, 40])
def test_the_number_of_launches_does_not_grow_with_the_records(kernels, records):
    counting = Counting(kernels)
    adam = TritonAdam(RULE, precision_of("fp32"), 0, kernels=counting, block=8)
    targets = [
        Target(str(number), 0, torch.ones(16), Entries.all((16,)), (torch.zeros(16), torch.zeros(16)), None)
        for number in range(records)
    ]
    for step in (1, 2):
        adam.update(targets, [torch.ones(16)] * records, [(1e-2, step)] * records, step)
    assert counting.grids == [(2 * records,)] * 2
    assert counting.tables[0] is counting.tables[1], "the tables are made once for a selection"
    adam.update([*targets[1:], targets[0]], [torch.ones(16)] * records, [(1e-2, 3)] * records, 3)
    assert (counting.tables[2] is counting.tables[1]) == (records == 1)


def test_a_gradient_of_another_size_is_refused(kernels, monkeypatch):
    interpret(monkeypatch, kernels, BLOCK)
    state, _ = made()
    with pytest.raises(ValueError, match="whole has 384 entries, its gradient 383"):
        state.update({"whole@1": torch.zeros(383)}, rate_of, 1)


def test_a_weight_that_is_not_contiguous_is_refused(kernels):
    weight = torch.zeros(4, 8).T
    target = Target("w", 0, weight, Entries.all((8, 4)), (torch.zeros(32), torch.zeros(32)), None)
    adam = TritonAdam(RULE, precision_of("fp32"), 0, kernels=kernels, block=8)
    with pytest.raises(ValueError, match="w is not contiguous"):
        adam.update([target], [torch.zeros(32)], [(1e-2, 1)], 1)


def test_it_says_why_it_does_not_serve(monkeypatch):
    assert "not for cpu" in why_no_triton(torch.device("cpu"))
    monkeypatch.setattr("blockllm_cli.optim.triton_adam.find_spec", lambda name: None)
    assert why_no_triton(torch.device("cuda")) == "Triton is not installed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_kernel_that_does_not_run_is_a_reason():
    assert why_no_triton(torch.device("cuda")).startswith("Triton's kernel does not run here: ")


def two_targets():
    draw = torch.Generator().manual_seed(4)
    shapes = {"a": (16, 8), "b": (8, 8)}
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    targets = []
    for name, weight in weights.items():
        moments = torch.zeros(weight.numel()), torch.zeros(weight.numel())
        targets.append(Target(name, 0, weight, Entries.all(tuple(weight.shape)), moments, None))
    return targets


def test_gradients_may_differ_in_dtype_and_lie_in_any_order(kernels):
    first, second = torch.randn(8, 16).bfloat16().T, torch.randn(8, 8)
    found = []
    for gradients in ([first, second], [first.float().contiguous(), second]):
        adam = TritonAdam(RULE, precision_of("fp32"), 0, kernels=kernels, block=8)
        targets = two_targets()
        adam.update(targets, gradients, [(1e-2, 1)] * 2, 1)
        found.append([tensor for target in targets for tensor in (target.weight, *target.slots)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


def test_the_tables_hold_no_index_of_entries_that_stop(kernels):
    adam = TritonAdam(RULE, precision_of("fp32"), 0, kernels=kernels, block=8)
    entries = Entries.of(torch.arange(0, 64, 2), (64,))
    index = weakref.ref(entries.index)
    target = Target("w", 0, torch.zeros(64), entries, (torch.zeros(32), torch.zeros(32)), None)
    adam.update([target], [torch.ones(32)], [(1e-2, 1)], 1)
    del target, entries
    gc.collect()
    assert index() is None


def test_nothing_to_update_is_no_launch(kernels):
    counting = Counting(kernels)
    adam = TritonAdam(RULE, precision_of("bf16"), 0, kernels=counting, block=8)
    assert adam.update([], [], [], 1, count_unchanged=True) is None
    entries = Entries.of(torch.empty(0, dtype=torch.int64), (64,))
    target = Target("w", 0, torch.zeros(64).bfloat16(), entries, (torch.empty(0), torch.empty(0)), None)
    assert adam.update([target], [torch.empty(0).bfloat16()], [(1e-2, 1)], 1, count_unchanged=True) is None
    assert counting.grids == []
