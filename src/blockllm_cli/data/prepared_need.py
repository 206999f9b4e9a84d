"""How far the shards must be prepared for a run: rows and targets from nothing but the lengths of documents.

A block's number of rows does not depend on the order of its documents, so it is known before any row is made.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from blockllm_cli.data.blocks import StreamSettings


class RowCount:
    """Counts what the whole blocks give of documents that are added in the order of an epoch.

    Args:
        settings: of the rows.

    Attributes:
        rows: rows of the blocks that are full so far.
        targets: their targets.
        documents: documents added.
    """

    def __init__(self, settings: StreamSettings) -> None:
        self._settings = settings
        self._begun = np.empty(0, np.int64)
        self.rows = 0
        self.targets = 0
        self.documents = 0

    def add(self, lengths: npt.NDArray[np.int64]) -> None:
        """Add documents with these numbers of ids, BOS and EOS not counted."""
        size = self._settings.block_documents
        self.documents += len(lengths)
        waiting = np.concatenate([self._begun, lengths])
        whole = len(waiting) - len(waiting) % size
        for begin in range(0, whole, size):
            self._count(waiting[begin : begin + size])
        self._begun = waiting[whole:]

    def _count(self, block: npt.NDArray[np.int64]) -> None:
        usable, length = block[block > 0], self._settings.sequence_length
        if self._settings.layout == "truncate":
            self.rows += len(usable)
            self.targets += int(np.minimum(usable, length - 1).sum())
        elif len(usable):
            self.rows += -(-(int(usable.sum()) + 2 * len(usable) - 1) // length)
            self.targets += int(usable.sum()) + len(usable)
