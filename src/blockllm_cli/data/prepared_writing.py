"""Writing an entry of the tokenised cache: one shard read once, tokenised by several processes, put down whole.

Documents go to the workers a few at a time and come back in their order, so the number of workers does not show in the
entry. Two processes that want the same shard do it once: the second waits for the first and finds it done.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blockllm_cli.data.blocks import Encoder
from blockllm_cli.data.corpus import is_held_out
from blockllm_cli.data.prepared_format import (
    BAD,
    EMPTY,
    FORMAT,
    GOOD,
    HELD_OUT,
    IDS,
    MANIFEST,
    RECORD,
    RECORDS,
    Entry,
    Manifest,
    Source,
    Totals,
    checksum,
    entry_name,
    ids_type,
    is_source,
    open_entry,
    tokens_folder,
)
from blockllm_cli.data.reader import ShardReader
from blockllm_cli.data.records import BadDocument, Document
from blockllm_cli.data.shards import Shard, shard_identity, unreadable
from blockllm_cli.data.stopping import StopCheck, never
from blockllm_cli.data.workers import WorkerPool
from blockllm_cli.durable import CACHE_OPTION, file_sha256, locked, storage_errors, sync_folder, write_json
from blockllm_cli.errors import InputError, StopRequested, StorageError

_BATCH_DOCUMENTS, _BATCH_BYTES = 256, 1 << 20
_POLL_SECONDS = 0.05
_REMEDY = "give fewer --workers; --workers 0 tokenises in the main process"

Ids = npt.NDArray[np.int32]
Made = tuple[Ids, list[int]]
"""Ids of several documents, one after the other, and how many each has."""

Report = Callable[[int], None]


def _unheard(documents: int) -> None:
    pass


class Prepared(NamedTuple):
    """What came of a shard.

    Attributes:
        entry: is there now.
        made: whether this call made it; otherwise it was there.
    """

    entry: Entry
    made: bool


@dataclass
class _Batch:
    """Some records of the reader: all columns of `RECORD` but `end`, and the texts of the good documents."""

    columns: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    bytes: int = 0

    @property
    def is_full(self) -> bool:
        return len(self.columns) >= _BATCH_DOCUMENTS or self.bytes >= _BATCH_BYTES


class Preparation:
    """Prepares shards for one tokenizer; a context manager, at whose end the workers are gone.

    Args:
        encoder: the tokenizer.
        cache: folder of the cache.
        workers: processes that tokenise; 0 tokenises in this one. They are started when the first shard needs them.
        should_stop: asked often.
    """

    def __init__(
        self,
        encoder: Encoder,
        cache: Path,
        *,
        workers: int,
        should_stop: StopCheck = never,
    ) -> None:
        self._encoder = encoder
        self._folder = tokens_folder(cache, encoder)
        self._workers = workers
        self._should_stop = should_stop
        self._pool: WorkerPool[list[str], Made] | None = None
        self._sent = 0

    def __enter__(self) -> Preparation:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.kill()
            self._pool.close()

    def find(self, shard: Shard) -> Entry | None:
        """The entry of `shard` if it is there and can be used, as far as sizes tell.

        Of a copy, which has another time and was therefore read to its end, the time is noted: runs need not read it.

        Raises:
            InputError: the shard is gone.
        """
        entry = usable_entry(self._folder / entry_name(shard_identity(shard)), shard)
        if entry is None or entry.manifest.source is None or entry.manifest.source.modified_ns == _modified(shard):
            return entry
        source = replace(entry.manifest.source, modified_ns=_modified(shard))
        entry = Entry(entry.folder, replace(entry.manifest, source=source))
        with contextlib.suppress(StorageError):  # a cache that others fill may be read-only
            write_json(entry.folder / MANIFEST, entry.manifest.as_json())
        return entry

    def prepare(self, shard: Shard, report: Report = _unheard) -> Prepared:
        """The entry of `shard`, made if it is not there or cannot be used.

        Args:
            shard: which.
            report: told how many more documents are done, often.

        Raises:
            InputError: the shard cannot be read, or changed while it was.
            StorageError: the cache cannot be written.
            StopRequested: `should_stop` became true; nothing is left of this shard.
        """
        identity = shard_identity(shard)
        place = self._folder / entry_name(identity)
        with storage_errors(place, "write", option=CACHE_OPTION):
            self._folder.mkdir(parents=True, exist_ok=True)
        with locked(self._folder / f".{place.name}.lock", self._should_stop, option=CACHE_OPTION):
            if (entry := usable_entry(place, shard)) is not None:
                return Prepared(entry, False)
            for rest in self._folder.glob(f".{place.name}.*.tmp"):  # of processes that were killed: we have the lock
                shutil.rmtree(rest, ignore_errors=True)
            beside = self._folder / f".{place.name}.{os.getpid()}.tmp"
            try:
                with storage_errors(place, "write", option=CACHE_OPTION):
                    beside.mkdir()
                    self._write(shard, identity, beside, report)
                    _put(beside, place)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        made = usable_entry(place, shard)
        if made is None:
            raise InputError(f"{shard} is being changed while it is prepared: prepare it when it is finished")
        return Prepared(made, True)

    def _write(self, shard: Shard, identity: str, folder: Path, report: Report) -> None:
        before = _modified(shard)
        ids = ids_type(self._encoder.vocab_size)
        with (folder / IDS).open("wb") as ids_file, (folder / RECORDS).open("wb") as records_file:
            writer = _Writer(ids_file, records_file, ids, self._encoder.vocab_size)
            for batch, made in self._tokenised(shard):
                writer.add(batch, made)
                report(len(batch.texts))
            for file in (ids_file, records_file):
                file.flush()
                os.fsync(file.fileno())
        source = Source(before, file_sha256(shard)) if isinstance(shard, Path) else None
        if _modified(shard) != before or shard_identity(shard) != identity:
            raise InputError(f"{shard} was changed while it was read: prepare it when it is finished")
        manifest = Manifest(
            format=FORMAT,
            shard=os.fsencode(shard.name).decode("utf-8", errors="replace"),
            identity=identity,
            ids=ids.str,
            totals=Totals(**writer.totals),
            sizes={name: (folder / name).stat().st_size for name in (IDS, RECORDS)},
            sha256={IDS: writer.ids_hash.hexdigest(), RECORDS: writer.records_hash.hexdigest()},
            reasons=tuple(writer.reasons),
            source=source,
        )
        write_json(folder / MANIFEST, manifest.as_json())

    def _tokenised(self, shard: Shard) -> Iterator[tuple[_Batch, Made]]:
        """Batches in order with their ids; as many are under way as there are workers."""
        under_way: list[tuple[int, _Batch]] = []
        for batch in _batches(shard, self._should_stop):
            if self._workers == 0:
                yield batch, tokenise(batch.texts, self._encoder)
                continue
            # Only a worker that has handed in its last answer is given more: so no pipe is filled from both ends.
            if len(under_way) == self._workers:
                yield self._received(*under_way.pop(0))
            if self._pool is None:
                self._pool = WorkerPool(self._encoder, tokenise, self._workers, remedy=_REMEDY)
            self._pool.send(self._sent, batch.texts)
            under_way.append((self._sent, batch))
            self._sent += 1
        for number, batch in under_way:
            yield self._received(number, batch)

    def _received(self, number: int, batch: _Batch) -> tuple[_Batch, Made]:
        assert self._pool is not None
        return batch, self._pool.receive(number, self._should_stop)


def tokenise(texts: list[str], encoder: Encoder) -> Made:
    """Ids of all texts in one array, and their numbers: what a worker sends back."""
    documents = encoder.encode(texts) if texts else []
    return np.concatenate([np.empty(0, np.int32), *documents]), [len(document) for document in documents]


def usable_entry(place: Path, shard: Shard) -> Entry | None:
    """The entry at `place` if it is whole, as far as sizes tell, and of this content of `shard`."""
    try:
        entry = open_entry(place)
        return entry if entry is not None and is_source(shard, entry.manifest) else None
    except (ValueError, OSError):
        return None


def discard(entry: Entry) -> None:
    """Remove an entry; who has it open reads on.

    Raises:
        StorageError: the disk refuses.
    """
    with storage_errors(entry.folder, "remove", option=CACHE_OPTION), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(entry.folder)  # another process may have found the damage as well


class _Writer:
    """Puts batches into the two files of an entry and keeps what the manifest says of them."""

    def __init__(self, ids_file: Any, records_file: Any, ids: np.dtype[Any], vocab_size: int) -> None:
        self._ids_file = ids_file
        self._records_file = records_file
        self._ids = ids
        self._vocab_size = vocab_size
        self.ids_hash, self.records_hash = hashlib.sha256(), hashlib.sha256()
        self.totals = asdict(Totals())
        self.reasons: list[str] = []

    def add(self, batch: _Batch, made: Made) -> None:
        """Append a batch."""
        ids, lengths = made
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise InputError(f"the tokenizer gives ids up to {int(ids.max())}, and has {self._vocab_size} pieces")
        records = np.zeros(len(batch.columns), RECORD)
        names = ("line", "line_after", "offset_after", "bytes", "surrogates", "kind")
        for name, column in zip(names, zip(*batch.columns, strict=True), strict=False):
            records[name] = column
        is_good = np.isin(records["kind"], (GOOD, HELD_OUT))
        counts = np.zeros(len(records), np.int64)
        counts[is_good] = lengths
        ends = np.cumsum(counts)
        records["end"] = self.totals["tokens"] + ends
        written = ids.astype(self._ids)
        records["checksum"] = [checksum(each) for each in np.split(written, ends[:-1])]
        for content, file, digest in (
            (written.tobytes(), self._ids_file, self.ids_hash),
            (records.tobytes(), self._records_file, self.records_hash),
        ):
            file.write(content)
            digest.update(content)
        self.reasons += batch.reasons
        self._count(records, len(lengths), len(ids))

    def _count(self, records: npt.NDArray[Any], documents: int, tokens: int) -> None:
        totals = self.totals
        totals["documents"] += documents
        totals["tokens"] += tokens
        for name, kind in (("held_out", HELD_OUT), ("empty", EMPTY), ("bad", BAD)):
            totals[name] += int((records["kind"] == kind).sum())
        for name in ("bytes", "surrogates"):
            totals[name] += int(records[name].sum(dtype=np.int64))


def _batches(shard: Shard, should_stop: StopCheck) -> Iterator[_Batch]:
    """The records of a shard, a few at a time."""
    batch = _Batch()
    reader = ShardReader(shard, should_stop=should_stop)
    for record in reader:
        after = reader.position
        if isinstance(record, Document):
            size = record.bytes
            kind = HELD_OUT if is_held_out(record.text) else GOOD
            batch.columns.append((record.line, after.line, after.offset, size, record.surrogates, kind))
            batch.texts.append(record.text)
            batch.bytes += size
        elif isinstance(record, BadDocument):
            batch.columns.append((record.line, after.line, after.offset, 0, 0, BAD))
            batch.reasons.append(record.reason)
        else:
            batch.columns.append((record.line, after.line, after.offset, 0, 0, EMPTY))
        if batch.is_full:
            if should_stop():
                raise StopRequested
            yield batch
            batch = _Batch()
    if batch.columns:
        yield batch


def _modified(shard: Shard) -> int:
    """Time of the last change of a local file; one of a hub has none."""
    if not isinstance(shard, Path):
        return 0
    try:
        return shard.stat().st_mtime_ns
    except OSError as error:
        raise unreadable(shard, error) from error


def _put(beside: Path, place: Path) -> None:
    """Give a finished entry its name, in the place of one that cannot be used."""
    sync_folder(beside)
    if place.exists():
        place.rename(beside / "former")  # its readers go on: they have the files open
    beside.rename(place)
    shutil.rmtree(place / "former", ignore_errors=True)
    sync_folder(place.parent)
