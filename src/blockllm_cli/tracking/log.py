"""log.txt: everything that was said of a run and more, each line with the time it was said, in bounded space."""

from __future__ import annotations

import contextlib
import time
from datetime import datetime
from pathlib import Path

from blockllm_cli.durable import storage_errors
from blockllm_cli.tracking.plain import printable

LOG_BYTES = 16 * 2**20
"""A log that reaches this size becomes `log.old.txt`, in the place of an earlier one, and a new one begins."""


class RunLog:
    """Appends to a log.

    Args:
        path: the file; made if missing.
        limit: bytes after which the file is put aside.

    Raises:
        StorageError: it cannot be opened.
    """

    def __init__(self, path: Path, limit: int = LOG_BYTES) -> None:
        self.path = path
        self._limit = limit
        self._open()

    def write(self, text: str, moment: float | None = None) -> None:
        """Add `text`, and hand it to the operating system.

        Args:
            text: one line or several; each gets the time.
            moment: when it was said, seconds since the epoch; absent: now.

        Raises:
            StorageError: the disk refuses.
        """
        said = datetime.fromtimestamp(time.time() if moment is None else moment).astimezone()
        stamp = said.isoformat(sep=" ", timespec="seconds")
        lines = "".join(f"{stamp}  {line}".rstrip() + "\n" for line in printable(text).split("\n"))
        with storage_errors(self.path, "write"):
            if self._file.tell() >= self._limit:
                self._file.close()
                self.path.replace(self.path.with_name(f"{self.path.stem}.old{self.path.suffix}"))
                self._open()
            self._file.write(lines)
            self._file.flush()

    def close(self) -> None:
        """Close the file; a failing disk has been reported by then."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _open(self) -> None:
        with storage_errors(self.path, "open"):
            self._file = self.path.open("a", encoding="utf-8", newline="\n")
