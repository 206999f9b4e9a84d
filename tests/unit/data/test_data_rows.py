"""The two layouts of rows, against a slow second version and by their properties."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockllm_cli.data.rows import PADDING, Rows, rows_from_documents

BOS, EOS = 1, 2
P = PADDING


def rows_of(documents, layout, length) -> Rows:
    arrays = [np.array(document, np.int32) for document in documents]
    labels = [f"shard:{i}" for i in range(len(documents))]
    return rows_from_documents(arrays, labels, layout=layout, sequence_length=length, bos_id=BOS, eos_id=EOS)


def test_truncate_keeps_the_first_pieces_and_ends_with_eos():
    rows = rows_of([[10, 11, 12, 13, 14], [20], [30, 31, 32], [40, 41, 42, 43]], "truncate", 4)
    assert rows.pieces.tolist() == [[10, 11, 12, EOS], [20, EOS, P, P], [30, 31, 32, EOS], [40, 41, 42, EOS]]
    assert rows.documents.tolist() == [[0, 0, 0, 0], [0, 0, P, P], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert rows.labels == [("shard:0",), ("shard:1",), ("shard:2",), ("shard:3",)]
    assert rows.targets_per_row().tolist() == [3, 1, 3, 3]
    assert rows.target_ids().tolist() == [11, 12, EOS, EOS, 31, 32, EOS, 41, 42, EOS]
    assert rows.slots == 16
    assert rows.pieces.dtype == rows.documents.dtype == np.int32


def test_pack_shares_one_piece_between_neighbours_and_no_target_crosses_a_document():
    rows = rows_of([[10, 11], [20, 21, 22], [30]], "pack", 4)
    assert rows.pieces.tolist() == [[BOS, 10, 11, EOS, BOS], [BOS, 20, 21, 22, EOS], [EOS, BOS, 30, EOS, P]]
    assert rows.documents.tolist() == [[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, P]]
    assert rows.labels == [("shard:0", "shard:1"), ("shard:1",), ("shard:1", "shard:2")]
    assert rows.targets_per_row().tolist() == [3, 4, 2]
    assert rows.target_ids().tolist() == [10, 11, EOS, 20, 21, 22, EOS, 30, EOS]


def test_pack_gives_no_row_without_a_target():
    # The stream ends exactly at a row's end: the piece it would share begins no further row.
    assert len(rows_of([[10, 11, 12]], "pack", 4)) == 1
    # With one position a row, EOS before BOS would be a row of its own.
    rows = rows_of([[10], [20]], "pack", 1)
    assert rows.pieces.tolist() == [[BOS, 10], [10, EOS], [BOS, 20], [20, EOS]]
    assert rows.labels == [("shard:0",)] * 2 + [("shard:1",)] * 2


@pytest.mark.parametrize("layout", ["truncate", "pack"])
def test_documents_without_pieces_are_in_no_row(layout):
    rows = rows_of([[], [10, 11], []], layout, 8)
    assert rows.labels == [("shard:1",)]
    assert len(rows_of([[]], layout, 8)) == len(rows_of([], layout, 8)) == 0
    assert rows_of([], layout, 8).targets_per_row().tolist() == []


def test_truncate_to_one_position_leaves_nothing_to_learn():
    assert len(rows_of([[10, 11]], "truncate", 1)) == 0


documents = st.lists(st.lists(st.integers(3, 9), max_size=9), max_size=12)


def slow_pack(docs, length):
    stream = [(piece, i) for i, doc in enumerate(docs) if doc for piece in (BOS, *doc, EOS)]
    rows = []
    for begin in range(0, len(stream), length):
        row = stream[begin : begin + length + 1]
        if any(a[1] == b[1] for a, b in pairwise(row)):
            rows.append(row)
    return rows


@given(documents, st.integers(1, 7))
def test_pack_equals_the_slow_version(docs, length):
    rows = rows_of(docs, "pack", length)
    slow = slow_pack(docs, length)
    assert len(rows) == len(slow)
    for pieces, numbers, labels, expected in zip(rows.pieces, rows.documents, rows.labels, slow, strict=True):
        padding = [P] * (length + 1 - len(expected))
        assert pieces.tolist() == [piece for piece, _ in expected] + padding
        assert [labels[n] for n in numbers if n != P] == [f"shard:{owner}" for _, owner in expected]
        assert numbers.tolist()[len(expected) :] == padding
        assert len(labels) == numbers.max() + 1


@given(documents, st.integers(1, 7))
def test_pack_has_every_transition_within_a_document_once(docs, length):
    """Each pair of neighbours of BOS ... EOS is a target exactly once, and nothing else is."""
    docs = [[100 * i + j + 3 for j in range(len(doc))] for i, doc in enumerate(docs)]  # all pieces different
    rows = rows_of(docs, "pack", length)
    mask = rows.target_mask()
    found = list(zip(rows.pieces[:, :-1][mask].tolist(), rows.pieces[:, 1:][mask].tolist(), strict=True))
    expected = [pair for doc in docs if doc for pair in zip((BOS, *doc), (*doc, EOS), strict=True)]
    assert found == expected
    assert rows.targets_per_row().sum() == sum(len(doc) + 1 for doc in docs if doc)
    assert (rows.targets_per_row() > 0).all()


@given(documents, st.integers(2, 7))
def test_truncate_properties(docs, length):
    rows = rows_of(docs, "truncate", length)
    kept = [doc for doc in docs if doc]
    assert rows.pieces.shape == rows.documents.shape == (len(kept), length)
    for pieces, doc in zip(rows.pieces.tolist(), kept, strict=True):
        expected = [*doc[: length - 1], EOS]
        assert pieces == expected + [P] * (length - len(expected))
    assert rows.targets_per_row().tolist() == [min(len(doc), length - 1) for doc in kept]


def test_an_id_that_also_pads_elsewhere_is_a_piece_here():
    """Padding is known by position: documents made of id 0, BOS or EOS keep all their targets."""
    rows = rows_of([[0, 0, EOS, BOS]], "truncate", 8)
    assert rows.targets_per_row().tolist() == [4]


def test_slices_and_concatenation_are_inverse():
    rows = rows_of([[10 * i, 10 * i + 1, 5] for i in range(1, 9)], "pack", 3)
    joined = Rows.concatenate([rows[:2], rows[2:3], rows[3:]])
    assert joined.pieces.tolist() == rows.pieces.tolist()
    assert joined.documents.tolist() == rows.documents.tolist()
    assert joined.labels == rows.labels
    assert joined.sequence_length == 3
    assert len(rows[2:5]) == 3
