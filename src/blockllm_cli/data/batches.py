"""From rows to what the model takes: the batch of one micro-batch on its device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from blockllm_cli.data.rows import Rows
from blockllm_cli.model import batch
from blockllm_cli.model.batch import Batch


def batch_of(rows: Rows, device: torch.device | str = "cpu") -> Batch:
    """The batch of `rows` on `device`; `documents` is None where each row holds one document."""
    return batch.batch_of(rows.pieces, rows.documents, sequence_length=rows.sequence_length, device=device)


def micro_batches(rows: Rows, micro_rows: int) -> Iterator[Rows]:
    """`rows` in parts of `micro_rows`, in order; the last part may be smaller."""
    for begin in range(0, len(rows), micro_rows):
        yield rows[begin : begin + micro_rows]
