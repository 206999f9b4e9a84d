"""Files that are either whole or not there: written beside, synced, renamed.

Every failure of the disk on the way becomes a `StorageError` that names the path and the space left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blockllm_cli.errors import InputError, StopRequested, StorageError
from blockllm_cli.units import format_bytes

CACHE_OPTION = "data.cache, or the environment variable BLOCKLLM_CACHE"
"""`option` of `storage_errors` for what lies in the cache."""

_POLL_SECONDS = 0.05


@contextlib.contextmanager
def storage_errors(path: Path, doing: str, *, option: str = "--output") -> Iterator[None]:
    """Turn an OSError inside the block into a StorageError such as "cannot write PATH: no space left (12 MiB free)".

    Args:
        path: what is written, named in the message.
        doing: the verb, such as "write".
        option: flag that names another place.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(path, doing, error, option=option) from error


def storage_error(path: Path, doing: str, error: OSError, *, option: str = "--output") -> StorageError:
    """The message for one failure of the disk, with what can be done about it."""
    reason = error.strerror or str(error)
    advice = {
        errno.ENOSPC: f"free some space, or write elsewhere with {option}",
        errno.EDQUOT: f"the quota is used up: free some space, or write elsewhere with {option}",
        errno.EFBIG: "the process may not write files this large (ulimit -f)",
        errno.EROFS: f"the file system is read-only: write elsewhere with {option}",
        errno.EACCES: f"no permission: write elsewhere with {option}",
    }.get(error.errno or 0, f"check the disk, or write elsewhere with {option}")
    return StorageError(f"cannot {doing} {path}: {reason} ({_free_space(path)}); {advice}")


def _free_space(path: Path) -> str:
    for folder in (path, *path.parents):
        try:
            return f"{format_bytes(shutil.disk_usage(folder).free)} free"
        except OSError:
            continue
    return "free space unknown"


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path`, replacing what is there, whole or not at all.

    Raises:
        StorageError: the disk refuses.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path, "write"):
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
            sync_folder(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`. Only for a folder that nobody else writes to.

    Raises:
        StorageError: the disk refuses.
    """
    with storage_errors(folder, "clean"):
        for rest in folder.glob(".*.tmp"):
            if rest.is_dir():
                shutil.rmtree(rest)
            else:
                rest.unlink()


def write_text(path: Path, content: str) -> None:
    """`write_bytes` for text, as UTF-8 whatever the locale."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` for a JSON value, indented; not-a-number and infinities are refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: it cannot be read, or is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return value


@contextlib.contextmanager
def locked(path: Path, should_stop: Callable[[], bool], *, option: str = "--output") -> Iterator[None]:
    """Hold the lock file `path`, which is made if it is not there, waiting for other holders: threads and processes.

    Args:
        path: the file.
        should_stop: looked at while waiting.
        option: as for `storage_errors`.

    Raises:
        StorageError: it cannot be made, or the file system has no locks.
        StopRequested: `should_stop` became true while waiting.
    """
    with storage_errors(path, "lock", option=option):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not _taken(path, descriptor, option):
            if should_stop():
                raise StopRequested
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _taken(path: Path, descriptor: int, option: str) -> bool:
    with storage_errors(path, "lock", option=option):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
