"""How what a rule is applied to is cut: completely, in order, and without a trace in the results."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockllm_cli.optim import bitmap, rounding, stored
from blockllm_cli.optim.adam import AdamRule
from blockllm_cli.optim.blocks import Piece
from blockllm_cli.optim.dense_state import DenseState
from blockllm_cli.optim.entries import Entries
from blockllm_cli.optim.kept_state import KeptState
from blockllm_cli.optim.precision import precision_of
from blockllm_cli.optim.scratch import Scratch
from blockllm_cli.optim.sgd import SgdRule
from blockllm_cli.optim.slices import Stored, groups


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    width=st.integers(1, 50),
    share=st.floats(0, 1),
    unit=st.sampled_from(["entry", "row"]),
    entries=st.integers(1, 700),
    seed=st.integers(0, 99),
)
def test_chunks_are_the_kept_entries_in_order(rows, width, share, unit, entries, seed):
    units = rows * width if unit == "entry" else rows
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    kept = Entries.of(order[: int(share * units)].sort().values, (rows, width), unit)
    if kept.is_all:
        return
    tensor, start = torch.randn(rows, width), 0
    found = []
    chunks = list(kept.chunks(entries))
    for chunk in chunks:
        assert chunk.start == start
        out = torch.empty(chunk.size)
        chunk.gather(tensor, out)
        found.append(out)
        start += chunk.size
        assert chunk is chunks[-1] or chunk.size % 64 == 0
    assert torch.equal(torch.cat([*found, torch.empty(0)]), tensor.view(-1)[kept.positions()])


def made(name, sizes):
    tensors = [torch.arange(float(size)) for size in sizes]
    return [Stored(f"{name}{index}", each, each, (each,), None) for index, each in enumerate(tensors)]


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=8), entries=st.sampled_from([64, 128, 256]))
def test_groups_hold_everything_once_and_no_more_than_they_may(sizes, entries):
    found = list(groups(made("a", sizes), entries))
    assert all(sum(part.size for part in group) <= entries for group in found)
    parts = [part for group in found for part in group]
    for index, size in enumerate(sizes):
        mine = [part for part in parts if part.name == f"a{index}"]
        assert [part.start for part in mine] == list(range(0, size, entries))
        assert torch.equal(torch.cat([part.gradient for part in mine]), torch.arange(float(size)))


def updated(precision, rounding_word, kind, entries, monkeypatch):
    monkeypatch.setattr(stored, "SLICE_ENTRIES", entries)
    state = KeptState(AdamRule(weight_decay=0.1, decoupled=True), precision_of(precision, rounding_word), 7)
    draw = torch.Generator().manual_seed(1)
    shapes = {"a": (40, 33), "b": (5,), "c": (64, 12)}
    dtype = precision_of(precision).weights
    weights = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    state.attach(weights)
    for name, shape in shapes.items():
        units = shape[0] if kind == "row" else torch.Size(shape).numel()
        kept = torch.randperm(units, generator=draw)[: units * 2 // 3].sort().values
        whole = kind == "whole" or name == "b"
        state.start(Piece(name, shape), Entries.all(shape) if whole else Entries.of(kept, shape, kind))
    for step in (1, 2, 3):
        gradients = {each.key: torch.randn(each.entries.count, generator=draw) for each in state.records()}
        state.update({key: each.to(dtype) for key, each in gradients.items()}, lambda _: 1e-2, step)
    return [*weights.values(), *(tensor for _, _, tensor in state.held())]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_master", "bf16_papers"])
@pytest.mark.parametrize("rounding_word", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", ["whole", "entry", "row"])
def test_the_size_of_slices_shows_in_no_bit(precision, rounding_word, kind, monkeypatch):
    """Stochastic draws included."""
    monkeypatch.setattr(rounding, "DRAW_ENTRIES", 512)
    monkeypatch.setattr(bitmap, "SLICE", 256)
    wanted = updated(precision, rounding_word, kind, 2**18, monkeypatch)
    found = updated(precision, rounding_word, kind, 128, monkeypatch)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


def test_scratch_is_used_again_and_grows_when_it_must():
    scratch = Scratch(8, torch.device("cpu"))
    first, second = scratch.take("a", 5, torch.float32), scratch.take("a", 3, torch.float32)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert second.storage_offset() == 5
    third = scratch.take("a", 20, torch.float32)
    first.fill_(1.0)
    third.fill_(2.0)
    assert (first == 1.0).all()
    scratch.clear()
    assert scratch.take("a", 20, torch.float32).data_ptr() == third.data_ptr()


def test_scratch_that_began_small_comes_to_rest():
    """The first update may be of a small tensor: later ones make no memory anew for ever."""
    scratch = Scratch(8, torch.device("cpu"))
    buffers = []
    for _ in range(6):
        scratch.clear()
        taken = [scratch.take("a", size, torch.float32) for size in (5, 300, 200, 100, 7)]
        buffers.append({each.untyped_storage().data_ptr() for each in taken})
    assert len(buffers[-1]) == 1
    assert buffers[-1] == buffers[-2]


def test_whether_an_update_is_counted_does_not_show():
    """In bf16 the last few entries of a thread are rounded as no others: where they lie must not depend on it."""
    found = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for counts in (False, True):
            draw = torch.Generator().manual_seed(0)
            weight = torch.randn(70 * 5461, generator=draw).bfloat16()
            state = DenseState(SgdRule(momentum=0.9, weight_decay=0.01, nesterov=True), precision_of("bf16_papers"), 0)
            state.allocate({"w": weight})
            for _ in range(20):
                gradient = torch.randn(weight.numel(), generator=draw).bfloat16()
                state.update({"w": gradient}, lambda _: 1e-2, count_unchanged=counts)
            found.append(weight)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
