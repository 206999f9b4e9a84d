"""From rows to tensors of a micro-batch."""

import numpy as np
import pytest
import torch

from blockllm_cli.data.batches import batch_of, micro_batches
from blockllm_cli.data.rows import rows_from_documents


def rows_of(documents, layout, length):
    arrays = [np.array(document, np.int32) for document in documents]
    labels = [f"s:{i}" for i in range(len(documents))]
    return rows_from_documents(arrays, labels, layout=layout, sequence_length=length, bos_id=1, eos_id=2)


@pytest.mark.parametrize("layout", ["truncate", "pack"])
def test_every_target_of_the_rows_is_a_target_of_the_batch(layout):
    rows = rows_of([[10 * i + j for j in range(1 + i % 5)] for i in range(1, 12)], layout, 4)
    batch = batch_of(rows)
    assert batch.num_targets == rows.targets_per_row().sum()
    assert batch.targets.tolist() == rows.target_ids().tolist()
    assert batch.input_ids.dtype == batch.positions.dtype == batch.targets.dtype == torch.int64
    width = batch.input_ids.shape[1]
    row, position = batch.positions // width, batch.positions % width
    flat = torch.from_numpy(rows.pieces.astype(np.int64))
    assert torch.equal(batch.input_ids[row, position], flat[row, position])
    assert torch.equal(batch.targets, flat[row, position + 1])


def test_rows_of_one_document_each_need_no_documents():
    rows = rows_of([[10, 11, 12, 13, 14, 15, 16]], "pack", 4)
    assert batch_of(rows).documents is None
    packed = batch_of(rows_of([[10], [20]], "pack", 8))
    assert packed.documents is not None
    assert packed.documents.dtype == torch.int32
    assert packed.documents[0].tolist()[:5] == [0, 0, 0, 1, 1]
    # BOS of the next document as the last piece is a target of nothing and no input.
    assert batch_of(rows_of([[10], [20]], "pack", 3)[:1]).documents is None


def test_padding_is_an_input_that_exists():
    batch = batch_of(rows_of([[10], [20, 21, 22]], "truncate", 6))
    assert (batch.input_ids >= 0).all()


def test_micro_batches_cover_the_rows_in_order():
    rows = rows_of([[i] for i in range(10, 20)], "truncate", 4)
    parts = list(micro_batches(rows, 4))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert np.array_equal(np.concatenate([part.pieces for part in parts]), rows.pieces)
    assert [labels for part in parts for labels in part.labels] == rows.labels
