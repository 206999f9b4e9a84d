import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockllm_cli.errors import InputError
from blockllm_cli.optim import bitmap
from blockllm_cli.optim import largest as largest_module
from blockllm_cli.optim.entries import Entries, positions_within
from blockllm_cli.optim.largest import largest_entries, largest_rows


def chosen(numel, count, seed=0):
    return torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:count].sort().values


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(1, 30), columns=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_every_form_gathers_scatters_and_survives_a_checkpoint(rows, columns, share, seed):
    shape = (rows, columns)
    positions = chosen(rows * columns, int(share * rows * columns), seed)
    entries = Entries.of(positions, shape)
    assert entries.count == positions.numel()
    tensor = torch.randn(shape)
    assert torch.equal(entries.gather(tensor), tensor.view(-1)[positions])
    again = Entries.restore(entries.state(), entries.index)
    target = torch.zeros(shape)
    again.scatter_(target, torch.arange(1.0, positions.numel() + 1))
    assert torch.equal(target.view(-1)[positions], torch.arange(1.0, positions.numel() + 1))
    assert int((target != 0).sum()) == positions.numel()
    assert torch.equal(entries.units(torch.device("cpu")), positions)
    if not entries.is_all:
        assert torch.equal(entries.positions(), positions)


@pytest.mark.parametrize(
    ("count", "form", "size"), [(0, "int32", 0), (3, "int32", 12), (25, "int32", 100), (26, "bitmap", 100)]
)
def test_the_smaller_form_is_taken(count, form, size):
    entries = Entries.of(chosen(800, count), (20, 40))
    assert (entries.form, entries.bytes) == (form, size)


def test_all_entries_need_no_index_and_no_copy():
    entries = Entries.of(torch.arange(800), (20, 40))
    assert (entries.form, entries.bytes, entries.count) == ("none", 0, 800)
    tensor = torch.randn(20, 40)
    assert entries.gather(tensor).data_ptr() == tensor.data_ptr()
    entries.scatter_(tensor, torch.ones(800))
    assert torch.equal(tensor, torch.ones(20, 40))


def test_a_bitmap_is_expanded_in_slices(monkeypatch):
    positions = chosen(8000, 3000)
    monkeypatch.setattr(bitmap, "SLICE", 512)
    entries = Entries.of(positions, (80, 100))
    assert entries.form == "bitmap"
    tensor = torch.randn(80, 100)
    assert torch.equal(entries.gather(tensor), tensor.view(-1)[positions])
    entries.scatter_(tensor, torch.zeros(3000))
    assert int((tensor == 0).sum()) == 3000
    assert torch.equal(entries.positions(), positions)


@pytest.mark.parametrize("rows", [[0, 3], [1], list(range(0, 16, 2)), []])
def test_rows_are_kept_as_rows(rows):
    rows = torch.tensor(rows, dtype=torch.int64)
    entries = Entries.of(rows, (16, 5), "row")
    tensor = torch.randn(16, 5)
    assert entries.count == 5 * len(rows)
    assert entries.bytes <= 4 * len(rows)
    assert torch.equal(entries.gather(tensor), tensor[rows].reshape(-1))
    assert torch.equal(entries.wanted_rows(), rows)
    assert torch.equal(tensor.view(-1)[entries.positions()], tensor[rows].reshape(-1))
    entries.scatter_(tensor, torch.full((entries.count,), 7.0))
    assert torch.equal(tensor[rows], torch.full((len(rows), 5), 7.0))


def test_single_entries_are_no_rows():
    assert Entries.of(torch.tensor([0, 1, 2]), (4, 3)).wanted_rows() is None


def test_a_piece_too_large_for_its_positions_is_refused():
    with pytest.raises(ValueError, match="int32"):
        Entries.of(torch.tensor([1]), (2**16, 2**16))


@pytest.mark.parametrize("index", [None, torch.zeros(4, dtype=torch.int32), torch.zeros(5, dtype=torch.uint8)])
def test_an_index_of_another_set_is_refused(index):
    saved = Entries.of(torch.tensor([1, 5, 7]), (10, 10)).state()
    with pytest.raises(InputError, match="index of kept entries"):
        Entries.restore(saved, index)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.integers(-4, 4), min_size=1, max_size=60),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_largest_magnitudes_with_ties_to_the_left(values, share, dtype):
    count = int(share * len(values))
    ranked = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    found = largest_entries(torch.tensor(values, dtype=dtype), count)
    assert found.tolist() == sorted(ranked[:count])
    assert found.dtype == torch.int64


def test_the_largest_rows_by_their_norm():
    gradient = torch.tensor([[3.0, 0.0], [2.0, 2.0], [0.0, -3.0], [1.0, 1.0]])
    assert largest_rows(gradient, 1).tolist() == [0]
    assert largest_rows(gradient, 2).tolist() == [0, 2]
    assert largest_rows(gradient.bfloat16(), 3).tolist() == [0, 1, 2]
    assert largest_rows(torch.tensor([1.0, -4.0, 2.0]), 2).tolist() == [1, 2]  # an entry of a vector is a row


@given(st.sets(st.integers(0, 40)), st.sets(st.integers(0, 40)))
def test_which_positions_are_among_others(mine, others):
    mine, others = sorted(mine), sorted(others)
    found = positions_within(torch.tensor(mine, dtype=torch.int64), torch.tensor(others, dtype=torch.int64))
    assert found.tolist() == [each in others for each in mine]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 700, 2999, 3000])
def test_the_largest_across_slices_in_every_dtype(dtype, count, monkeypatch):
    monkeypatch.setattr(largest_module, "_SLICE", 512)
    draw = torch.Generator().manual_seed(count)
    values = torch.randn(3000, generator=draw, dtype=torch.float64).mul(3).exp().to(dtype) * 1e-3
    values[::2] *= -1
    order = torch.sort(values.abs(), descending=True, stable=True).indices[:count]
    assert torch.equal(largest_entries(values.view(30, 100), count), order.sort().values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_is_kept_first_so_that_the_norm_shows_it(dtype):
    gradient = torch.ones(40, dtype=dtype)
    gradient[7], gradient[9], gradient[30] = float("-inf"), float("nan"), float("inf")
    assert largest_entries(gradient, 1).tolist() == [9]
    assert largest_entries(gradient, 4).tolist() == [0, 7, 9, 30]
    assert largest_rows(gradient.view(8, 5), 3).tolist() == [0, 1, 6]
    assert largest_rows(gradient.view(8, 5), 1).tolist() == [1]


def test_a_bitmap_with_other_bits_set_than_were_counted_is_refused():
    entries = Entries.of(torch.arange(0, 100, 2), (100,))
    assert entries.form == "bitmap"
    index = entries.index.clone()
    index[3] |= 255
    with pytest.raises(InputError, match="54 bits set"):
        Entries.restore(entries.state(), index)


@pytest.mark.parametrize("entries", [Entries.all((4, 3)), Entries.of(torch.tensor([0, 2]), (4, 3), "row")])
def test_units_may_be_asked_for_as_entries_or_as_rows(entries):
    cpu = torch.device("cpu")
    rows = entries.units(cpu, "row")
    assert rows.tolist() == ([0, 1, 2, 3] if entries.is_all else [0, 2])
    assert torch.equal(entries.units(cpu, "entry"), torch.arange(12).view(4, 3)[rows].view(-1))
