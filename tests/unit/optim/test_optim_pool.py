"""State of units of one piece, put together and taken apart."""

import torch

from blockllm_cli.optim.pool import Pool

CPU = torch.device("cpu")


def pool(width, units, counter, dtype=torch.int64):
    units = torch.tensor(units, dtype=dtype)
    values = units.unsqueeze(1) * 10.0 + torch.arange(width)
    return Pool(width, units, torch.full(units.shape, counter, dtype=torch.int32), {"m": values, "v": -values})


def test_merged_is_sorted_and_keeps_what_belongs_together():
    both = Pool.merged([pool(3, [1, 6], 4), pool(3, [0, 3], 2, torch.int32)], CPU)
    assert both.width == 3
    assert both.units.tolist() == [0, 1, 3, 6]
    assert both.units.dtype == torch.int64
    assert both.counters.tolist() == [2, 4, 2, 4]
    assert torch.equal(both.values["m"][:, 0], both.units * 10.0)
    assert torch.equal(both.values["v"], -both.values["m"])


def test_rows_and_entries_merge_by_entry():
    both = Pool.merged([pool(3, [1], 4), pool(1, [0, 8], 2)], CPU)
    assert both.width == 1
    assert both.units.tolist() == [0, 3, 4, 5, 8]
    assert both.counters.tolist() == [2, 4, 4, 4, 2]
    assert both.values["m"].view(-1).tolist() == [0.0, 10.0, 11.0, 12.0, 80.0]


def test_parts_are_copies_divided_by_their_counter():
    both = Pool.merged([pool(2, [1, 6], 4), pool(2, [0, 3], 2)], CPU)
    chosen = both.part(both.among(torch.tensor([1, 2, 3, 9])))
    assert chosen.units.tolist() == [1, 3]
    parts = both.by_counter()
    assert {counter: part.units.tolist() for counter, part in parts.items()} == {2: [0, 3], 4: [1, 6]}
    parts[2].values["m"].zero_()
    assert both.values["m"].count_nonzero() > 0
    assert torch.equal(parts[4].values["m"], both.values["m"][[1, 3]])
