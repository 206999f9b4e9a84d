"""What one forward pass is given: input ids, which document each position is of, and the targets by position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """Rows of token ids with their targets.

    Padding is known by position: it has no target, and nothing before it can see it. Which id stands there is
    irrelevant.

    Attributes:
        input_ids: (B, L) int64.
        documents: (B, L) int32, index of the document within the row; None if every row is one document.
        positions: (T,) int64, ascending indices into the B * L flattened positions: those that have a target.
        targets: (T,) int64, the id to predict at each of `positions`.
    """

    input_ids: Tensor
    documents: Tensor | None
    positions: Tensor
    targets: Tensor

    @property
    def num_targets(self) -> int:
        """Number of target tokens T."""
        return self.targets.numel()

    @property
    def num_rows(self) -> int:
        """Number of rows B."""
        return self.input_ids.shape[0]


def batch_of(
    pieces: NDArray[np.int32], documents: NDArray[np.int32], *, sequence_length: int, device: torch.device | str = "cpu"
) -> Batch:
    """Make the batch of rows of pieces.

    Position i is an input for i < sequence_length; its target is piece i + 1, if that exists, is not padding and is of
    the same document. Columns to the right of the last target of all rows are left out: attention is causal, so they
    cannot change a loss.

    Args:
        pieces: (B, W) int32, -1 where padded; W is sequence_length, or one more.
        documents: (B, W) int32, index of the document within the row, -1 where padded.
        sequence_length: most input positions of a row.
        device: where the tensors go.
    """
    has_target = (pieces[:, 1:] >= 0) & (documents[:, 1:] == documents[:, :-1])
    has_target = has_target[:, :sequence_length]
    used = has_target.any(axis=0).nonzero()[0]
    width = int(used[-1]) + 1 if used.size else 1
    has_target = has_target[:, :width]
    inputs, following, owners = pieces[:, :width], pieces[:, 1 : width + 1], documents[:, :width]
    one_document = not (owners > 0).any()
    return Batch(
        input_ids=torch.from_numpy(inputs.clip(min=0).astype("int64")).to(device),
        documents=None if one_document else torch.from_numpy(owners.copy()).to(device),
        positions=torch.from_numpy(has_target.reshape(-1).nonzero()[0]).to(device),
        targets=torch.from_numpy(following[has_target].astype("int64")).to(device),
    )
