from __future__ import annotations

import numpy as np
import torch

from blockllm_cli.model.batch import batch_of


def as_arrays(rows, documents):
    return np.array(rows, dtype=np.int32), np.array(documents, dtype=np.int32)


def test_a_truncated_row_has_no_target_at_its_end_nor_in_padding():
    pieces, documents = as_arrays([[5, 6, 7, 2], [8, 2, -1, -1]], [[0, 0, 0, 0], [0, 0, -1, -1]])
    batch = batch_of(pieces, documents, sequence_length=4)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 2, 0]]
    assert batch.positions.tolist() == [0, 1, 2, 3]
    assert batch.targets.tolist() == [6, 7, 2, 2]
    assert batch.documents is None
    assert (batch.num_rows, batch.num_targets) == (2, 4)


def test_no_target_crosses_a_document():
    pieces, documents = as_arrays([[1, 5, 2, 1, 6]], [[0, 0, 0, 1, 1]])
    batch = batch_of(pieces, documents, sequence_length=4)
    assert batch.positions.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [5, 2, 6]
    assert batch.documents.tolist() == [[0, 0, 0, 1]]
    assert batch.documents.dtype == torch.int32


def test_columns_without_a_target_in_any_row_are_left_out():
    pieces, documents = as_arrays([[5, 6, -1, -1, -1], [7, 8, 9, -1, -1]], [[0, 0, -1, -1, -1], [0, 0, 0, -1, -1]])
    assert batch_of(pieces, documents, sequence_length=4).input_ids.shape == (2, 2)


def test_rows_without_any_target_make_a_batch_of_none():
    pieces, documents = as_arrays([[5, -1, -1]], [[0, -1, -1]])
    batch = batch_of(pieces, documents, sequence_length=2)
    assert (batch.input_ids.shape, batch.num_targets) == ((1, 1), 0)


def test_what_is_padded_is_known_by_position_not_by_id():
    pieces, documents = as_arrays([[0, 0, 0, -1]], [[0, 0, 0, -1]])
    assert batch_of(pieces, documents, sequence_length=3).targets.tolist() == [0, 0]
