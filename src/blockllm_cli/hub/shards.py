"""Files of a hub on disk: fetched as they are read, kept for the next reader, within a bound.

A file is read while it is being fetched. What has come stays as `NAME.part`, so that neither a fault, a stop nor a kill
loses it; a later reader continues behind it. A file that is whole is compared with the hash that the hub lists. Files
are kept by their content, so that revisions and configurations share them. The least recently used ones go when the
bound is passed; one that is open stays readable until it is closed.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blockllm_cli.durable import CACHE_OPTION, locked, storage_errors, sync_folder
from blockllm_cli.errors import InputError, StopRequested
from blockllm_cli.hub.http import fetch_range
from blockllm_cli.hub.link import OFFLINE_WAYS, PROBE_SECONDS, FaultError, Link, Patience, in_background
from blockllm_cli.hub.remote import RemoteFile
from blockllm_cli.units import format_bytes

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK_BYTES = 8 << 20
"""Fetched by one request. Between requests no connection is open: a reader may be slower than a server is patient."""

_PROGRESS_BYTES = 1 << 16
_LOCAL_TRIES = 3


@dataclass(frozen=True)
class ShardCache:
    """A folder of fetched files.

    Attributes:
        folder: made when it is first needed.
        limit_bytes: what it may hold beside the files in use.
    """

    folder: Path
    limit_bytes: int

    def place(self, remote: RemoteFile) -> Path:
        """Where the whole file is, or will be."""
        return self.folder / remote.content[:2] / remote.content / remote.name

    def holds(self, remote: RemoteFile) -> bool:
        """Whether the whole file is there."""
        return self.place(remote).is_file()

    def make_room(self, spared: Path) -> None:
        """Remove the least recently used files until the bound is kept; `spared` stays."""
        found = []
        for file in self.folder.glob("*/*/*"):
            with contextlib.suppress(OSError):
                if file.suffix != ".lock":
                    found.append((file.stat().st_mtime, file.stat().st_size, file))
        total = sum(size for _, size, _ in found)
        for _, size, file in sorted(found):
            if total <= self.limit_bytes:
                return
            if file.parent != spared.parent:
                with contextlib.suppress(OSError):
                    file.unlink()
                    total -= size


@dataclass(frozen=True)
class HubShard:
    """A file of the hub that can be opened as if it were here.

    Attributes:
        remote: which file.
        cache: where its bytes are kept.
        link: how they are fetched.
    """

    remote: RemoteFile
    cache: ShardCache
    link: Link

    @property
    def name(self) -> str:
        """The file's name."""
        return self.remote.name

    def __str__(self) -> str:
        return f"{self.remote.repository}/{self.remote.path}"

    def opened(self, should_stop: Callable[[], bool]) -> io.BufferedReader:
        """The content, fetched as far as it is read.

        Args:
            should_stop: looked at while a read waits; the read then raises `StopRequested`.

        Raises:
            InputError: by a read: the hub does not give the bytes in time, or not those that it lists.
            StorageError: by a read: the disk refuses them.
        """
        return io.BufferedReader(_Fetched(self, should_stop), buffer_size=1 << 18)

    def local(self, should_stop: Callable[[], bool]) -> Path:
        """The whole file on disk, for libraries that want a path.

        Raises:
            InputError, StorageError, StopRequested: as reading it does.
        """
        for _ in range(_LOCAL_TRIES):
            with self.opened(should_stop) as file:
                while file.read(CHUNK_BYTES):
                    pass
            if self.cache.holds(self.remote):
                return self.cache.place(self.remote)
        raise InputError(
            f"{self}: other processes throw it out of {self.cache.folder} before it is read: raise "
            "data.shard_cache_bytes, or use another data.cache"
        )


class _Fetched(io.RawIOBase):
    """Reads a file on disk that grows by a chunk whenever a read comes to its end.

    All goes through one descriptor: should another process throw the unfinished file out of the cache, this reader goes
    on with what then has no name any more.
    """

    def __init__(self, shard: HubShard, should_stop: Callable[[], bool]) -> None:
        super().__init__()
        self._shard = shard
        self._should_stop = should_stop
        self._place = shard.cache.place(shard.remote)
        self._part = self._place.with_name(self._place.name + ".part")
        self._position = 0
        with storage_errors(self._place, "write", option=CACHE_OPTION):
            self._place.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
        if self._here() >= shard.remote.size and not self._place.exists():
            self._grow()  # who fetched the last byte was killed before it was compared

    def _open(self) -> io.FileIO:
        with contextlib.suppress(FileNotFoundError):
            if self._place.stat().st_size == self._shard.remote.size:
                _touch(self._place)
                return io.FileIO(self._place, "rb")
            self._place.unlink()  # cut by something else: it had its size when it was named
        # Never emptied: another reader may have begun it since.
        file = io.FileIO(os.open(self._part, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        _touch(self._part)
        return file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._shard.remote.size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        if self._position >= self._shard.remote.size:
            return 0
        while self._here() <= self._position:
            self._grow()
        self._file.seek(self._position)
        count = self._file.readinto(buffer)
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed and "_file" in vars(self):  # not there if it could not be opened
            self._file.close()
        super().close()

    def _here(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _grow(self) -> None:
        """Fetch the next chunk, unless another reader of the same file has done so meanwhile."""
        size = self._shard.remote.size
        with storage_errors(self._place, "write", option=CACHE_OPTION):
            self._place.parent.mkdir(parents=True, exist_ok=True)  # someone may have removed the cache meanwhile
        with locked(self._place.with_name(self._place.name + ".lock"), self._waits_for_lock, option=CACHE_OPTION):
            self._shard.link.doing = ""
            if self._place.exists():
                self._file.close()
                self._file = self._open()
            have = self._here()
            if have <= self._position and have < size:
                self._shard.cache.make_room(spared=self._place)
                self._fetch(have, min(have + CHUNK_BYTES, size))
            if self._here() >= size and not self._place.exists():
                self._finish()

    def _waits_for_lock(self) -> bool:
        self._shard.link.doing = f"{self._shard}, which another reader of {self._place.parent} fetches"
        return self._should_stop()

    def _fetch(self, start: int, stop: int) -> None:
        """Bring the part on disk from `start` to `stop` bytes, with as many requests as that takes."""
        link = self._shard.link
        what = f"{self._shard} at {format_bytes(start)} of {format_bytes(self._shard.remote.size)}"
        if link.out_of_reach is not None:
            raise InputError(
                f"{what}: no more of it was fetched before, and {link.out_of_reach}. What works {OFFLINE_WAYS}"
            )
        link.doing = what
        patience = Patience(link, what, self._should_stop)
        have = start
        while have < stop:
            sink, fault = self._request(have, stop)
            if sink:
                self._append(sink, have)
                have += len(sink)
            if len(sink) >= _PROGRESS_BYTES:
                patience.progress()
            if have < stop:
                patience.wait(fault or FaultError("the transfer broke off"))
        link.doing = ""

    def _request(self, start: int, stop: int) -> tuple[bytes, FaultError | None]:
        """What one request brings, whole or not, and what ended it."""
        remote = self._shard.remote
        # Also where nothing is tried again, an answer is given the time that it takes.
        retry_seconds = max(self._shard.link.retry_seconds, PROBE_SECONDS)
        sink, cancelled = bytearray(), threading.Event()
        seen, since = 0, time.monotonic()

        def stalled_or_stopped() -> bool:
            nonlocal seen, since
            if len(sink) >= seen + _PROGRESS_BYTES:
                seen, since = len(sink), time.monotonic()
            return self._should_stop() or time.monotonic() - since > retry_seconds

        fault = None
        try:
            in_background(
                lambda: fetch_range(remote.url, start, stop, remote.size, sink, cancelled),
                stalled_or_stopped,
                limit=float("inf"),
            )
        except FaultError as error:
            fault = error
        except StopRequested:
            cancelled.set()
            if self._should_stop():
                raise
            fault = FaultError(f"less than {format_bytes(_PROGRESS_BYTES)} came in {retry_seconds:g} s")
        return bytes(sink), fault

    def _append(self, content: bytes, at: int) -> None:
        with storage_errors(self._part, "write", option=CACHE_OPTION):
            self._file.seek(at)
            rest = memoryview(content)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())

    def _finish(self) -> None:
        """Give the whole file its name, if it is what the hub lists."""
        with storage_errors(self._place, "write", option=CACHE_OPTION):
            try:
                is_named = self._part.samefile(f"/dev/fd/{self._file.fileno()}")
            except FileNotFoundError:
                is_named = False
            if not is_named:
                return
            if self._shard.remote.is_in(self._part):
                self._part.replace(self._place)
                sync_folder(self._place.parent)
                return
            self._part.unlink()
        raise InputError(
            f"{self._shard}: what came is not what the hub lists (another hash); it was removed from the cache. A "
            "proxy or a failing disk may have damaged it: run the same command again, with --resume for a run"
        )


def _touch(path: Path) -> None:
    """What was read last is thrown out last; a cache that others fill may be read-only."""
    with contextlib.suppress(OSError):
        os.utime(path)
