"""The rows of a run in the one global order, with a position that a later process continues from to the row.

Everything that `take` returns, rows and events alike, depends on what has been consumed and never on what has been
read ahead, so that a resumed run repeats the unbroken one. The state is a few hundred bytes of plain JSON; continuing
from it reads at most the block in progress again, and passes over what lies before it in that shard unparsed.

The position counts rows of all ranks, and every rank walks the same blocks: a checkpoint of any number of ranks is
continued by any other number, and the ranks come to the end of the data in the same `take`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from blockllm_cli.data.blocks import (
    BuiltBlock,
    Cursor,
    Encoder,
    StreamSettings,
    TextBlock,
    document_order,
    encoded,
    lay_out,
    read_blocks,
)
from blockllm_cli.data.corpus import Corpus
from blockllm_cli.data.prefetch import BlockSource
from blockllm_cli.data.prepared import NOTHING_PREPARED, PreparedShards
from blockllm_cli.data.rows import Pieces, Rows
from blockllm_cli.data.stopping import Progress, StopCheck, never, unheard
from blockllm_cli.errors import InputError

__all__ = [
    "VALIDATION_SEED",
    "RowStream",
    "StreamSettings",
    "Taken",
    "rank_share",
    "rows_digest",
    "validation_rows",
]

Event = dict[str, Any]

_NAMED_AT_LIMIT = 3
VALIDATION_SEED = 0
"""Of the order of validation documents, whatever the seed of the run."""


@dataclass(frozen=True)
class Taken:
    """What one `take` brought.

    Attributes:
        rows: exactly as many as were asked for, those of all ranks: what is summed and hashed over an update is known
            to each of them, and `RowStream.own` gives the part that it trains on.
        events: what was met on the way, each a plain dict with a `kind`: `bad_document` (file, line, reason) or `epoch`
            (epoch: passes completed). The same on every rank.
    """

    rows: Rows
    events: list[Event]


@dataclass
class Counts:
    """What the first pass over a corpus has met so far; later passes meet the same and count nothing.

    Attributes:
        documents: good documents of this side of the corpus.
        rows: rows made of them.
        bad: bad documents.
        empty: documents without a visible character.
        without_target: good documents that gave no target.
        surrogates: lone surrogates replaced in good documents.
    """

    documents: int = 0
    rows: int = 0
    bad: int = 0
    empty: int = 0
    without_target: int = 0
    surrogates: int = 0

    def add(self, block: TextBlock, built: BuiltBlock) -> None:
        """Count a block."""
        self.documents += built.documents
        self.rows += len(built.rows)
        self.bad += len(block.bad)
        self.empty += block.empty
        self.without_target += built.without_target
        self.surrogates += block.surrogates


class RowStream:
    """Gives the rows of training, as many at a time as are asked for, across blocks and epochs.

    A context manager; `close` ends its thread and its workers.

    Args:
        corpus: the documents.
        tokenizer: what turns them into pieces; workers make their own from its class and `model_bytes`.
        settings: what decides the rows.
        state: what `state()` gave on any rank, to continue from there; None begins at the first row.
        should_stop: asked every few hundredths of a second while `take` waits or builds; once true, `take` raises
            `StopRequested`, keeps what it has gathered, and may be called again for as many rows.
        prepared: shards whose ids are read in place of their text; the rows and the state do not depend on it.
        rank: which of the `world_size` processes that train together this is.
        world_size: how many these are.

    Attributes:
        events_at_end: empty until `take` has returned None; then what was met after the last rows that were given, and
            `exhausted` (rows_dropped: too few for another `take`).

    Raises:
        InputError: the files of the corpus are not those of `state`.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Encoder,
        *,
        settings: StreamSettings,
        state: Mapping[str, Any] | None = None,
        should_stop: StopCheck = never,
        prepared: PreparedShards = NOTHING_PREPARED,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._settings = settings
        self._rank = rank
        self._world_size = world_size
        self._should_stop = should_stop
        self._fingerprint = corpus.fingerprint()
        if state is None:
            state = _beginning(self._fingerprint)
        elif state["corpus"] != self._fingerprint:
            raise InputError(
                "the training files are not those of the checkpoint (another name, size or number of files): a run "
                "continues only on the same files; put them back, or start a new run. Those of a hub are at the commit "
                "that the run's first line of events.jsonl names: --set data.revision=COMMIT"
            )
        self._state = dict(state)
        self._counts = Counts(**state["counts"])
        self._finished = False
        self.events_at_end: list[Event] = []
        self._resumed_row: int | None = state["row"]  # None: no row of the block was taken, nor anything counted
        self._block: TextBlock | None = None
        self._rows: Rows | None = None
        self._row = 0
        self._gathered: list[Rows] = []
        self._events: list[Event] = []
        self._waited = 0.0
        self._source = BlockSource(
            corpus,
            tokenizer,
            settings,
            epoch=state["epoch"],
            index=state["block"],
            start=Cursor(*state["cursor"]),
            prepared=prepared,
        )

    def __enter__(self) -> RowStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the reading thread and the workers; may be called twice."""
        self._source.close()

    @property
    def waited_seconds(self) -> float:
        """Seconds that `take` has waited for blocks (or, without workers, built them) since the stream was made."""
        return self._waited

    def state(self) -> dict[str, Any]:
        """The position after the last successful `take` as plain JSON values; `counts` are those of `Counts`."""
        return dict(self._state)

    def take(self, count: int) -> Taken | None:
        """The next `count` rows, or None if the stream ends before (`on_exhausted = "stop"`); see `events_at_end`.

        Args:
            count: rows of all ranks together; every rank asks for the same number.

        Raises:
            InputError: too many bad documents, no usable row in a whole pass, or a file that cannot be read.
            BlockLLMError: a worker is gone.
            StopRequested: see the class.
        """
        missing = count - sum(len(rows) for rows in self._gathered)
        while missing > 0 and not self._finished:
            if self._rows is None or self._row == len(self._rows):
                self._advance()
                continue
            part = self._rows[self._row : self._row + missing]
            self._gathered.append(part)
            self._row += len(part)
            missing -= len(part)
        if missing > 0:
            self.events_at_end = [*self._events, {"kind": "exhausted", "rows_dropped": count - missing}]
            return None
        taken = Taken(Rows.concatenate(self._gathered), self._events)
        self._gathered, self._events = [], []
        self._state = self._position()
        return taken

    def own(self, rows: Rows) -> Rows:
        """What this rank trains on, of the rows of an update; all, where there is one rank."""
        return rows[rank_share(len(rows), self._rank, self._world_size)]

    def _advance(self) -> None:
        """Go on to the next block, over the end of an epoch if it stands there."""
        if self._block is not None and self._block.is_last:
            if self._counts.rows == 0:
                raise InputError(_nothing_usable("training", self._counts))
            if self._settings.on_exhausted == "stop":
                self._finished = True
                return
        begun = time.perf_counter()
        try:
            block, built = self._source.next_block(self._should_stop)
        finally:
            self._waited += time.perf_counter() - begun
        if self._block is not None and self._block.is_last:
            self._events.append({"kind": "epoch", "epoch": block.epoch})
        self._block, self._rows = block, built.rows
        if self._resumed_row is not None:
            self._row, self._resumed_row = self._resumed_row, None
            if self._row > len(built.rows):
                raise InputError(
                    f"the checkpoint stands at row {self._row} of a block that has {len(built.rows)} rows now: the "
                    "training files have changed since; put them back, or start a new run"
                )
            return
        self._row = 0
        if block.epoch == 0:
            self._counts.add(block, built)
            self._events += _bad_document_events(block)
        _check_bad(block, self._counts, self._settings)

    def _position(self) -> dict[str, Any]:
        assert self._block is not None
        return {
            "corpus": self._fingerprint,
            "epoch": self._block.epoch,
            "block": self._block.index,
            "cursor": list(self._block.start),
            "row": self._row,
            "counts": vars(self._counts).copy(),
        }


def rank_share(count: int, rank: int, world_size: int) -> slice:
    """The rows of an update that one rank trains on, out of `count`.

    Shares are contiguous and differ by one row at most, so that no rank waits long for another, and together they are
    all rows in their order. With fewer rows than ranks some share is empty.
    """
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


def validation_rows(
    corpus: Corpus,
    tokenizer: Encoder,
    settings: StreamSettings,
    tokens: int,
    *,
    report: Callable[[Event], None] | None = None,
    should_stop: StopCheck = never,
    prepared: PreparedShards = NOTHING_PREPARED,
    progress: Progress = unheard,
) -> Rows:
    """The fixed rows of a run's evaluations: the first ones of `corpus` that together have `tokens` targets, or all.

    Laid out as the training rows are, in an order that no seed of the run changes.

    Args:
        corpus: the validation side.
        tokenizer: what turns documents into pieces.
        settings: of the run; `seed`, `on_exhausted` and `workers` have no part in it.
        tokens: targets wanted.
        report: told of `bad_document` events, unless the training stream reads the same files and reports them, and of
            `validation_short` (targets, wanted) where the corpus has fewer.
        should_stop: asked every few documents.
        prepared: shards whose ids are read in place of their text.
        progress: told the targets so far, of `tokens`.

    Raises:
        InputError: no usable row, too many bad documents, or a file that cannot be read.
        StopRequested: `should_stop` became true.
    """
    settings = replace(settings, seed=VALIDATION_SEED)
    counts = Counts()
    parts: list[Rows] = []
    missing = tokens
    for block in read_blocks(corpus, settings=settings, prepared=prepared, should_stop=should_stop):
        built = _built_up_to(missing, block, tokenizer, settings, should_stop, _from(tokens - missing, progress))
        counts.add(block, built)
        _check_bad(block, counts, settings)
        if report is not None and corpus.part == "all":
            for event in _bad_document_events(block):
                report(event)
        parts.append(built.rows)
        missing -= int(built.rows.targets_per_row().sum())
        if missing <= 0:
            break
    if counts.rows == 0:
        raise InputError(_nothing_usable("validation", counts))
    rows = Rows.concatenate(parts)
    if missing > 0:
        if report is not None:
            report({"kind": "validation_short", "targets": tokens - missing, "wanted": tokens})
        return rows
    return rows[: int(np.searchsorted(np.cumsum(rows.targets_per_row()), tokens)) + 1]


def rows_digest(previous: bytes, rows: Rows) -> bytes:
    """sha256 over `previous` and the pieces of `rows`: row-major little-endian int32, padding as -1; 32 bytes."""
    return hashlib.sha256(previous + rows.pieces.astype("<i4").tobytes()).digest()


def _from(begin: int, progress: Progress) -> Progress:
    """Tells `progress` what is done from `begin` on."""
    return lambda done, total: progress(begin + done, None if total is None else begin + total)


def _built_up_to(
    tokens: int,
    block: TextBlock,
    encoder: Encoder,
    settings: StreamSettings,
    should_stop: StopCheck,
    progress: Progress,
) -> BuiltBlock:
    """The rows of `block` that `build_block` makes, or the first of them if these have at least `tokens` targets."""
    order = document_order(len(block.texts), settings.seed, block.epoch, block.index)
    length = settings.sequence_length
    documents: list[Pieces] = []
    targets = 0
    for document in encoded([block.texts[i] for i in order], encoder, should_stop):
        documents.append(document)
        targets += min(len(document), length - 1) if settings.layout == "truncate" else len(document) + 1
        progress(min(targets, tokens), tokens)
        # A row more than is wanted: the last row of what is laid out may lack the documents that are left away.
        if targets >= tokens + length:
            break
    return lay_out(documents, [block.labels[i] for i in order[: len(documents)]], encoder, settings)


def _beginning(fingerprint: str) -> dict[str, Any]:
    return {
        "corpus": fingerprint,
        "epoch": 0,
        "block": 0,
        "cursor": [0, 0, 0],
        "row": None,
        "counts": vars(Counts()),
    }


def _bad_document_events(block: TextBlock) -> list[Event]:
    return [
        {"kind": "bad_document", "file": file, "line": document.line, "reason": document.reason}
        for file, document in block.bad
    ]


def _check_bad(block: TextBlock, counts: Counts, settings: StreamSettings) -> None:
    bad = max(counts.bad, len(block.bad))
    if not block.bad or bad <= settings.max_bad_documents:
        return
    last = "".join(
        f"\n  {file}, line {document.line}: {document.reason}" for file, document in block.bad[-_NAMED_AT_LIMIT:]
    )
    raise InputError(
        f"{bad} bad documents so far, and data.max_bad_documents = {settings.max_bad_documents} allows no more. "
        f"The last ones:{last}\nRepair or leave out the files, or raise data.max_bad_documents"
    )


def _nothing_usable(side: str, counts: Counts) -> str:
    return (
        f"the {side} data have no usable row: {counts.documents} good documents, of which {counts.without_target} have "
        f"no target, {counts.empty} empty and {counts.bad} bad ones. A document is JSON with its text under `text`, or "
        "a paragraph of a .txt file. Without data.validation, one document in 20 of data.train is held out for it"
    )
