"""Reads a file of JSON lines while another process writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


class RowFeed:
    """New rows of a growing file, each once.

    A file that was replaced or shortened, as at a resume, is read again from its beginning; who takes the rows knows
    their steps.

    Args:
        path: the file; it may come into being later.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._identity: tuple[int, int] | None = None

    def new(self) -> Iterator[dict[str, Any]]:
        """Complete rows that were not read before. A line that is no row with a whole `step` is passed over."""
        file = self._current()
        if file is None:
            return
        while True:
            start = file.tell()
            line = file.readline()
            if not line.endswith(b"\n"):
                file.seek(start)  # nothing, or a line that is being written
                return
            row = _row(line)
            if row is not None:
                yield row

    def _current(self) -> BinaryIO | None:
        try:
            found = self._path.stat()
        except OSError:
            return self._file
        identity = (found.st_dev, found.st_ino)
        if self._file is None or identity != self._identity or found.st_size < self._file.tell():
            self.close()
            try:
                self._file = self._path.open("rb")
            except OSError:
                return None
            self._identity = identity
        return self._file

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
