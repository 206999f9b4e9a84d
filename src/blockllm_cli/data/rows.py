"""From token ids of documents to rows of one length, in the two layouts of `data.layout`.

`truncate`, the protocol of the papers: one document a row, at most `sequence_length` pieces of it with EOS as the last,
padded on the right. `pack`: the documents of a block, each as BOS ... EOS, are laid end to end and cut into rows of
`sequence_length` + 1 pieces that share one piece with their neighbour, so that every transition within a document is
trained exactly once. In both, a target never crosses a document, and padding is known by its position, never by an id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Layout = Literal["truncate", "pack"]
Pieces = npt.NDArray[np.int32]

PADDING = -1
"""What stands in `Rows.pieces` and `Rows.documents` where there is no piece."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of pieces; position i of a row is an input, its target is piece i + 1 if that is of the same document.

    Attributes:
        pieces: (R, W) int32 token ids, `PADDING` where a row has ended; W = L for `truncate`, L + 1 for `pack`.
        documents: (R, W) int32, which document of its row a piece belongs to, counted from 0; `PADDING` likewise.
        labels: per row the labels `shard:line` of its documents, in the order of the numbers in `documents`.
        sequence_length: L, the number of input positions of a row.
    """

    pieces: Pieces
    documents: Pieces
    labels: list[tuple[str, ...]]
    sequence_length: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> Rows:
        """The rows of a slice, without copying pieces."""
        return Rows(self.pieces[part], self.documents[part], self.labels[part], self.sequence_length)

    @property
    def slots(self) -> int:
        """Input positions, padding included."""
        return len(self) * self.sequence_length

    def target_ids(self) -> npt.NDArray[np.int32]:
        """(T,) int32: the ids of all targets, row by row."""
        return self.pieces[:, 1:][self.target_mask()]

    def target_mask(self) -> npt.NDArray[np.bool_]:
        """(R, W - 1) bool: whether position i has a target, namely piece i + 1."""
        mask: npt.NDArray[np.bool_] = self.documents[:, 1:] == self.documents[:, :-1]
        mask &= self.documents[:, 1:] != PADDING
        return mask

    def targets_per_row(self) -> npt.NDArray[np.int64]:
        """(R,) int64: number of positions of each row that have a target."""
        counts: npt.NDArray[np.int64] = self.target_mask().sum(axis=1, dtype=np.int64)
        return counts

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """One set of rows out of at least one part of equal layout and length, in the order given."""
        if len(parts) == 1:
            return parts[0]
        return Rows(
            np.concatenate([part.pieces for part in parts]),
            np.concatenate([part.documents for part in parts]),
            [labels for part in parts for labels in part.labels],
            parts[0].sequence_length,
        )


def rows_from_documents(
    documents: Sequence[Pieces],
    labels: Sequence[str],
    *,
    layout: Layout,
    sequence_length: int,
    bos_id: int,
    eos_id: int,
) -> Rows:
    """Rows of the documents of one block, in their order; no row is without a target.

    Args:
        documents: token ids of each document, 1-D int32, without BOS and EOS. One that cannot give a target is left
            out (see `has_target`).
        labels: name of each document.
        layout: how rows are laid out, see the module.
        sequence_length: L, input positions of a row.
        bos_id: id that opens a document (`pack`).
        eos_id: id that ends a document (both layouts).
    """
    usable = [i for i, document in enumerate(documents) if has_target(document, layout, sequence_length)]
    kept = [documents[i] for i in usable]
    names = [labels[i] for i in usable]
    if layout == "truncate":
        return _truncated(kept, names, sequence_length, eos_id)
    return _packed(kept, names, sequence_length, bos_id, eos_id)


def has_target(document: Pieces, layout: Layout, sequence_length: int) -> bool:
    """Whether a document has a piece to learn from; one that is tokenised to nothing has not, whatever frames it."""
    return len(document) > 0 and (layout == "pack" or sequence_length > 1)


def _truncated(documents: list[Pieces], labels: list[str], sequence_length: int, eos_id: int) -> Rows:
    pieces = np.full((len(documents), sequence_length), PADDING, np.int32)
    for row, document in zip(pieces, documents, strict=True):
        length = min(len(document), sequence_length - 1)
        row[:length] = document[:length]
        row[length] = eos_id
    numbers = np.where(pieces == PADDING, np.int32(PADDING), np.int32(0))
    return Rows(pieces, numbers, [(label,) for label in labels], sequence_length)


def _packed(documents: list[Pieces], labels: list[str], sequence_length: int, bos_id: int, eos_id: int) -> Rows:
    width = sequence_length + 1
    lengths = np.array([len(document) + 2 for document in documents], np.int64)
    total = int(lengths.sum())
    count = -(-(total - 1) // sequence_length) if documents else 0
    stream = np.full(count * sequence_length + 1, PADDING, np.int32)
    owner = np.full(count * sequence_length + 1, PADDING, np.int64)
    if documents:
        bos, eos = np.array([bos_id], np.int32), np.array([eos_id], np.int32)
        np.concatenate([part for document in documents for part in (bos, document, eos)], out=stream[:total])
        owner[:total] = np.repeat(np.arange(len(documents)), lengths)
    cut = np.arange(count)[:, None] * sequence_length + np.arange(width)
    pieces, owners = stream[cut], owner[cut]

    # Documents follow each other without a gap, so the first owner of a row is number 0 and the largest the last.
    first, last = owners[:, 0], owners.max(axis=1, initial=0)
    numbers = np.where(owners == PADDING, PADDING, owners - first[:, None]).astype(np.int32)
    names = [tuple(labels[a : b + 1]) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
    rows = Rows(pieces, numbers, names, sequence_length)
    filled = rows.targets_per_row() > 0  # with one position a row, EOS before BOS is a row without a target
    if filled.all():
        return rows
    kept = np.flatnonzero(filled)
    return Rows(pieces[kept], numbers[kept], [names[i] for i in kept.tolist()], sequence_length)
