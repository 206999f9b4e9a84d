"""Reading from the tokenised cache: documents whose token ids were written before, in place of their text.

A `PreparedReader` says of a shard exactly what a `ShardReader` says, but for ids in place of texts. So rows, events,
counts and positions do not depend on which shards are prepared, and a run may change between the two at any place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blockllm_cli.data.corpus import Part
from blockllm_cli.data.prepared_format import (
    BAD,
    EMPTY,
    GOOD,
    HELD_OUT,
    IDS,
    RECORD,
    RECORDS,
    Entry,
    Vocabulary,
    checksum,
    entry_name,
    is_source,
    open_entry,
    tokens_folder,
)
from blockllm_cli.data.reader import Position, ShardReader
from blockllm_cli.data.records import BadDocument, EmptyDocument, Record
from blockllm_cli.data.shards import Shard, shard_identity
from blockllm_cli.data.stopping import StopCheck, never
from blockllm_cli.durable import file_sha256
from blockllm_cli.errors import StopRequested

Ids = npt.NDArray[Any]
"""Token ids of one document, 1-D, of any integer type."""

_RECORDS_AT_ONCE = 1024
"""Records between two looks at `should_stop`."""


class PreparedDocument(NamedTuple):
    """A good document whose ids are known: a view of the mapped file, which is read when it is looked at."""

    line: int
    ids: Ids
    surrogates: int
    bytes: int
    held_out: bool


class PreparedReader:
    """Iterates once over the records of a prepared shard, in their order.

    From the first document on whose ids are not those that were written, the text is read instead.

    Args:
        shard: which.
        entry: what is prepared of it.
        start: where to begin, a `position` that an earlier reader of this shard, prepared or not, had after a good
            document.
        should_stop: asked now and then; when true, iteration ends with `StopRequested`.
        part: of which side the ids are looked at by the caller; those of the other are not read.
        say: told of damaged ids.

    Attributes:
        position: the place after the record that was yielded last.

    Raises:
        ValueError: the records are damaged, or no document ends at `start`.
        OSError: a file of the entry cannot be read.
    """

    def __init__(
        self,
        shard: Shard,
        entry: Entry,
        start: Position | None = None,
        should_stop: StopCheck = never,
        part: Part = "all",
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.position = start or Position(0, 0)
        self._shard = shard
        self._entry = entry
        self._should_stop = should_stop
        self._used = _kinds_of(part)
        self._say = say
        # The records are small and read once from end to end, so their hash is looked at; the ids, which are mapped so
        # that only what is used is read, have a checksum for each document, and a hash for `data prepare --check`.
        if file_sha256(entry.folder / RECORDS) != entry.manifest.sha256[RECORDS]:
            raise ValueError(f"{RECORDS} is damaged: its hash is not that of the manifest")
        self._records = np.fromfile(entry.folder / RECORDS, RECORD)
        self._reasons = entry.manifest.reasons
        self._ids = _mapped(entry.folder / IDS, entry.manifest.ids)
        self._first = _place_after(self.position, self._records)

    def __iter__(self) -> Iterator[PreparedDocument | Record]:
        first, records, ids = self._first, self._records, self._ids
        end_before = int(records["end"][first - 1]) if first else 0
        bad = int((records["kind"][:first] == BAD).sum())
        for begin in range(first, len(records), _RECORDS_AT_ONCE):
            if self._should_stop():
                raise StopRequested
            for record in records[begin : begin + _RECORDS_AT_ONCE].tolist():
                line, line_after, offset_after, end, size, surrogates, written, kind = record
                if kind in self._used and checksum(ids[end_before:end]) != written:
                    error = ValueError(f"{IDS} is damaged: the ids of line {line} are not those that were written")
                    self._say(_unusable(self._shard, self._entry.folder, error))
                    yield from self._text()
                    return
                self.position = Position(line_after, offset_after)
                if kind == BAD:
                    yield BadDocument(line, self._reasons[bad])
                    bad += 1
                elif kind == EMPTY:
                    yield EmptyDocument(line)
                else:
                    yield PreparedDocument(line, ids[end_before:end], surrogates, size, kind == HELD_OUT)
                end_before = end

    def _text(self) -> Iterator[Record]:
        """The rest of the shard, from its text."""
        reader = ShardReader(self._shard, self.position, self._should_stop)
        for record in reader:
            self.position = reader.position
            yield record


def _mapped(path: Path, kind: str) -> Ids:
    if path.stat().st_size == 0:  # nothing can be mapped of an empty file
        return np.empty(0, kind)
    return np.asarray(np.memmap(path, kind, mode="r"))


def _place_after(start: Position, records: npt.NDArray[Any]) -> int:
    """Number of the first record after the good document that ends at `start`.

    A bad document at damage leaves the position where it was, so several records may stand at one; a good document is
    the first of them.
    """
    if start == Position(0, 0):
        return 0
    place = int(np.searchsorted(records["line_after"], start.line))
    if place == len(records) or records[["line_after", "offset_after"]][place].item() != tuple(start):
        raise ValueError(f"no document ends at line {start.line}")
    return place + 1


@dataclass(frozen=True)
class PreparedShards:
    """Which shards are prepared for one tokenizer.

    Attributes:
        entries: by the shard's path or name on the hub.
        problems: why entries that are there are not used, a line each.
        say: told of an entry that turns out to be damaged when it is opened; may be called from another thread.
    """

    entries: Mapping[str, Entry] = field(default_factory=dict)
    problems: Sequence[str] = ()
    say: Callable[[str], None] = lambda line: None

    def reader(
        self, shard: Shard, start: Position | None = None, should_stop: StopCheck = never, part: Part = "all"
    ) -> ShardReader | PreparedReader:
        """What reads the documents of one side of `shard` from `start`: as ids where these are prepared and whole."""
        entry = self.entries.get(str(shard))
        if entry is not None:
            try:
                return PreparedReader(shard, entry, start, should_stop, part, self.say)
            except (ValueError, OSError) as error:
                self.say(_unusable(shard, entry.folder, error))
        return ShardReader(shard, start, should_stop)


NOTHING_PREPARED = PreparedShards()


def find_prepared(
    shards: Sequence[Shard], encoder: Vocabulary, cache: Path, say: Callable[[str], None] = lambda line: None
) -> PreparedShards:
    """The entries of `cache` for these shards and this tokenizer; no network is needed for it.

    Args:
        shards: which shards; those of a hub need not be here.
        encoder: the tokenizer.
        cache: folder of the cache.
        say: see `PreparedShards`.

    Raises:
        InputError: a local shard is gone.
    """
    folder = tokens_folder(cache, encoder)
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for shard in dict.fromkeys(shards) if folder.is_dir() else ():
        place = folder / entry_name(shard_identity(shard))
        try:
            entry = open_entry(place)
            if entry is None:
                continue
            if not is_source(shard, entry.manifest):
                raise ValueError("the file has changed since it was prepared")
        except (ValueError, OSError) as error:
            problems.append(_unusable(shard, place, error))
            continue
        entries[str(shard)] = entry
    return PreparedShards(entries, problems, say)


def lengths_of(entry: Entry, part: Part) -> npt.NDArray[np.int64]:
    """Number of ids of each good document of one side, in file order: all that is needed to count rows.

    Raises:
        OSError: the records cannot be read.
    """
    records = np.fromfile(entry.folder / RECORDS, RECORD)
    ends: npt.NDArray[np.int64] = records["end"].astype(np.int64)
    lengths = ends - np.concatenate([np.zeros(1, np.int64), ends])[: len(ends)]
    chosen: npt.NDArray[np.int64] = lengths[np.isin(records["kind"], _kinds_of(part))]
    return chosen


def _kinds_of(part: Part) -> tuple[int, ...]:
    """Kinds of the good documents of one side."""
    return {"all": (GOOD, HELD_OUT), "train": (GOOD,), "validation": (HELD_OUT,)}[part]


def _unusable(shard: Shard, folder: Path, error: ValueError | OSError) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (
        f"what is prepared of {shard} is not used: {reason} ({folder}); its text is read instead, and "
        "`blockllm data prepare --check` makes it anew"
    )
