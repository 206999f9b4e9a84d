"""The one order in which documents are seen, and the blocks it is cut into.

In each epoch the shards are permuted by (seed, epoch) and their documents follow in file order, cut into blocks of
`block_documents` good documents; the documents of a block are permuted by (seed, epoch, block). So a block's rows are a
function of (seed, epoch, block) alone: any number of workers gives the same rows, and a position is a block and a row.
A document moves within its block and with its shard, no further: that is the mixing radius.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from blockllm_cli.data.corpus import Corpus
from blockllm_cli.data.prepared import NOTHING_PREPARED, Ids, PreparedDocument, PreparedShards
from blockllm_cli.data.reader import Position
from blockllm_cli.data.records import BadDocument, Document, EmptyDocument
from blockllm_cli.data.rows import Layout, Pieces, Rows, has_target, rows_from_documents
from blockllm_cli.data.stopping import StopCheck, never
from blockllm_cli.errors import StopRequested

_ENCODED_AT_ONCE = 64
"""Documents between two looks at `should_stop`."""

_SHARD_ORDER, _DOCUMENT_ORDER = 0, 1


class Encoder(Protocol):
    """What is asked of a tokenizer here; it can be made anew in another process from `model_bytes`."""

    def encode(self, texts: list[str]) -> list[Pieces]:
        """Token ids of each text, 1-D int32, without BOS and EOS."""

    @property
    def bos_id(self) -> int:
        """Id that opens a document."""

    @property
    def eos_id(self) -> int:
        """Id that ends a document."""

    @property
    def vocab_size(self) -> int:
        """Number of pieces; ids are below it."""

    @property
    def model_bytes(self) -> bytes:
        """All that the constructor of the class needs."""


@dataclass(frozen=True)
class StreamSettings:
    """What decides the rows of a stream and how they are made; the keys of `[data]` of the same names.

    Attributes:
        seed: of the order of shards and documents, at least 0.
        sequence_length: input positions of a row.
        layout: see `rows`.
        block_documents: good documents of a block.
        on_exhausted: whether the documents are repeated in another order or the stream ends after them.
        max_bad_documents: bad documents that are skipped before the stream refuses to go on.
        workers: processes that tokenise; 0 tokenises in the calling process.
    """

    seed: int
    sequence_length: int
    layout: Layout = "pack"
    block_documents: int = 4096
    on_exhausted: Literal["repeat", "stop"] = "repeat"
    max_bad_documents: int = 100
    workers: int = 1


class Cursor(NamedTuple):
    """A place in an epoch: which shard of the permuted order, and the position in it."""

    shard: int
    line: int
    offset: int


@dataclass
class TextBlock:
    """A block as it is read.

    Attributes:
        epoch: from 0.
        index: number of the block in its epoch, from 0.
        start: where reading it begins.
        labels: `shard:line` of each good document, in file order.
        texts: text of each good document, or its ids where they are prepared, in file order.
        bytes: of these texts in UTF-8.
        bad: (file, document) of each bad document met.
        empty: empty documents met.
        surrogates: lone surrogates replaced.
        is_last: whether the epoch ends with it; the last block of an epoch may be without documents.
    """

    epoch: int
    index: int
    start: Cursor
    labels: list[str] = field(default_factory=list)
    texts: list[str | Ids] = field(default_factory=list)
    bytes: int = 0
    bad: list[tuple[str, BadDocument]] = field(default_factory=list)
    empty: int = 0
    surrogates: int = 0
    is_last: bool = False


def read_blocks(
    corpus: Corpus,
    *,
    settings: StreamSettings,
    epoch: int = 0,
    index: int = 0,
    start: Cursor | None = None,
    prepared: PreparedShards = NOTHING_PREPARED,
    should_stop: StopCheck = never,
) -> Generator[TextBlock, None, None]:
    """Yield the blocks of one epoch from block `index`, which begins at `start`, to its last.

    A block that alone has more bad documents than `settings.max_bad_documents` is cut off there and the last to come.

    Raises:
        InputError: a file cannot be opened or its format is not supported here.
        StopRequested: `should_stop` became true.
    """
    order = shard_order(len(corpus.shards), settings.seed, epoch)
    names = corpus.names
    place = start or Cursor(0, 0, 0)
    block = TextBlock(epoch, index, place)
    for number in range(place.shard, len(order)):
        shard = corpus.shards[order[number]]
        begin = Position(place.line, place.offset) if number == place.shard else None
        reader = prepared.reader(shard, begin, should_stop, corpus.part)
        for record in reader:
            if isinstance(record, BadDocument):
                block.bad.append((str(shard), record))
                if len(block.bad) > settings.max_bad_documents:
                    yield block
                    return
            elif isinstance(record, EmptyDocument):
                block.empty += 1
            elif _belongs(record, corpus):
                block.labels.append(f"{names[order[number]]}:{record.line}")
                block.texts.append(record.text if isinstance(record, Document) else record.ids)
                block.bytes += record.bytes
                block.surrogates += record.surrogates
                if len(block.texts) == settings.block_documents:
                    yield block
                    block = TextBlock(epoch, block.index + 1, Cursor(number, *reader.position))
    block.is_last = True
    yield block


def _belongs(record: Document | PreparedDocument, corpus: Corpus) -> bool:
    if isinstance(record, Document):
        return corpus.holds(record.text)
    return corpus.part == "all" or record.held_out == (corpus.part == "validation")


@dataclass(frozen=True)
class BuiltBlock:
    """The rows of a block.

    Attributes:
        rows: rows of its documents in their permuted order.
        documents: how many documents it has.
        without_target: how many of these gave no target and are in no row.
    """

    rows: Rows
    documents: int
    without_target: int


def build_block(
    block: TextBlock, encoder: Encoder, settings: StreamSettings, *, should_stop: StopCheck = never
) -> BuiltBlock:
    """Tokenise the documents of `block` in their permuted order and lay them out as rows.

    Raises:
        StopRequested: `should_stop` became true; nothing is kept.
    """
    order = document_order(len(block.texts), settings.seed, block.epoch, block.index)
    documents = list(encoded([block.texts[i] for i in order], encoder, should_stop))
    return lay_out(documents, [block.labels[i] for i in order], encoder, settings)


def encoded(texts: Sequence[str | Ids], encoder: Encoder, should_stop: StopCheck = never) -> Iterator[Pieces]:
    """Token ids of each text, made a few texts at a time; those that are there already are passed on."""
    for begin in range(0, len(texts), _ENCODED_AT_ONCE):
        if should_stop():
            raise StopRequested
        part = texts[begin : begin + _ENCODED_AT_ONCE]
        fresh = [text for text in part if isinstance(text, str)]
        made = iter(encoder.encode(fresh) if fresh else ())
        for text in part:
            yield next(made) if isinstance(text, str) else text.astype(np.int32)


def lay_out(documents: list[Pieces], labels: list[str], encoder: Encoder, settings: StreamSettings) -> BuiltBlock:
    """Rows of tokenised documents in their order, and how many were left out for want of a target."""
    rows = rows_from_documents(
        documents,
        labels,
        layout=settings.layout,
        sequence_length=settings.sequence_length,
        bos_id=encoder.bos_id,
        eos_id=encoder.eos_id,
    )
    usable = sum(has_target(document, settings.layout, settings.sequence_length) for document in documents)
    return BuiltBlock(rows, len(documents), len(documents) - usable)


def shard_order(count: int, seed: int, epoch: int) -> list[int]:
    """Permutation of the shards in `epoch`."""
    return _permutation(count, (seed, _SHARD_ORDER, epoch))


def document_order(count: int, seed: int, epoch: int, block: int) -> list[int]:
    """Permutation of the documents of one block."""
    return _permutation(count, (seed, _DOCUMENT_ORDER, epoch, block))


def _permutation(count: int, key: tuple[int, ...]) -> list[int]:
    # Sorting raw output of the bit generator: numpy promises that stream for good, but not what permutation() makes
    # of it, and an order must not change with the version of numpy.
    draws: npt.NDArray[np.uint64] = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    order: list[int] = np.argsort(draws, kind="stable").tolist()
    return order
