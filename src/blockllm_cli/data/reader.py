"""Reads the documents of one shard and tells the good, the bad and the empty apart, whatever state the file is in.

Formats, decided by content where it can decide:

- parquet (its magic bytes) and arrow (its name): the column `text`; a row counts as a line.
- text (the name ends in `.txt`, `.text` or `.md`, before any `.gz` or `.zst`): documents are separated by blank
  lines, so that a book is a few thousand documents and not one row; a file without blank lines is one document.
- anything else: JSON lines, one object a line with the document under `text`; other keys are ignored.

Text is UTF-8 whatever the locale. A document is bad if it cannot be decoded, parsed, or has no text; damage of the
compression costs one bad document, the unfinished rest, after every whole line before it. A document without a visible
character is empty, which is counted apart and not an error. A lone surrogate, which UTF-8 cannot hold, is replaced by
U+FFFD and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from blockllm_cli.data.decompress import DamagedError, decompressed
from blockllm_cli.data.records import BadDocument, Record, not_utf8, told_apart
from blockllm_cli.data.shards import Shard, opened, unreadable
from blockllm_cli.data.stopping import StopCheck, never
from blockllm_cli.data.tables import ARROW_NAME, PARQUET_MAGIC, arrow_rows, parquet_rows
from blockllm_cli.errors import StopRequested

MAX_DOCUMENT_BYTES = 1 << 28
"""A line (or paragraph of a text file) above this is bad: reading stays bounded on files that are no lines at all."""

_BOM = b"\xef\xbb\xbf"
_TEXT_NAME = re.compile(r"\.(txt|text|md)(\.gz|\.zst)?$", re.IGNORECASE)
_JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
}


class Position(NamedTuple):
    """A place between two documents of a shard: lines before it, and bytes of the decompressed file before it.

    In a table both count rows.
    """

    line: int
    offset: int


class ShardReader:
    """Iterates once over the records of one file, in their order.

    Args:
        shard: the file.
        start: where to begin, a `position` that an earlier reader of the same file had.
        should_stop: asked between pieces of the file; when true, iteration ends with `StopRequested`.

    Attributes:
        position: the place after the record that was yielded last.

    Raises:
        InputError: while iterating: the file cannot be opened, or the package for its format is not installed.
    """

    def __init__(self, shard: Shard, start: Position | None = None, should_stop: StopCheck = never) -> None:
        self.shard = shard
        self.position = start or Position(0, 0)
        self._should_stop = should_stop

    def __iter__(self) -> Iterator[Record]:
        with opened(self.shard, self._should_stop) as file:
            try:
                magic = file.read(len(PARQUET_MAGIC))
            except OSError as error:
                raise unreadable(self.shard, error) from error
        if not magic:
            yield BadDocument(0, "the file is empty (0 bytes)")
        elif magic == PARQUET_MAGIC:
            yield from self._rows(parquet_rows(self.shard, self.position.line, self._should_stop))
        elif self.shard.name.lower().endswith(ARROW_NAME):
            yield from self._rows(arrow_rows(self.shard, self.position.line, self._should_stop))
        else:
            yield from self._damage_reported(_TEXT_NAME.search(self.shard.name) is not None)

    def _damage_reported(self, is_text: bool) -> Iterator[Record]:
        try:
            yield from self._paragraphs() if is_text else self._json_lines()
        except DamagedError as error:
            yield BadDocument(self.position.line + 1, str(error))

    def _json_lines(self) -> Iterator[Record]:
        number, offset = self.position
        for line, size in self._lines():
            number += 1
            offset += size
            self.position = Position(number, offset)
            if size > MAX_DOCUMENT_BYTES:
                yield BadDocument(number, f"longer than {MAX_DOCUMENT_BYTES} bytes")
            elif line and not line.isspace():
                yield _parsed(line, number)

    def _paragraphs(self) -> Iterator[Record]:
        number, offset = self.position
        first, length, lines = 0, 0, list[bytes]()
        for line, size in self._lines():
            number += 1
            offset += size
            if line and not line.isspace():
                first = first or number
                length += size
                if length <= MAX_DOCUMENT_BYTES:
                    lines.append(line)
                continue
            # A position never stands within a document: the lines of one that is unfinished are read again.
            self.position = Position(number, offset)
            if first:
                yield _paragraph(lines, first, length)
                first, length, lines = 0, 0, []
        self.position = Position(number, offset)
        if first:
            yield _paragraph(lines, first, length)

    def _lines(self) -> Iterator[tuple[bytes, int]]:
        """Lines without newline and byte order mark, and their size with both; too long a line comes cut."""
        begun: list[bytes] = []
        size = 0
        for piece in decompressed(self.shard, self.position.offset, self._should_stop):
            if self._should_stop():
                raise StopRequested
            parts = piece.split(b"\n")
            begun.append(parts[0])
            size += len(parts[0])
            if len(parts) > 1:
                yield b"".join(begun).removeprefix(_BOM), size + 1
                for i in range(1, len(parts) - 1):
                    yield parts[i].removeprefix(_BOM), len(parts[i]) + 1
                begun, size = [parts[-1]], len(parts[-1])
            elif size > MAX_DOCUMENT_BYTES:
                begun = []
        if size:
            yield b"".join(begun).removeprefix(_BOM), size

    def _rows(self, rows: Iterator[tuple[int, Record]]) -> Iterator[Record]:
        for number, record in rows:
            self.position = Position(number, number)
            yield record


def _parsed(line: bytes, number: int) -> Record:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadDocument(number, not_utf8(error))
    except json.JSONDecodeError as error:
        return BadDocument(number, f"not valid JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested by the thousand
        return BadDocument(number, f"not usable JSON: {error}")
    if not isinstance(value, dict):
        return BadDocument(number, f"{_JSON_TYPES.get(type(value), 'null')}, not an object with the key `text`")
    text = value.get("text")
    if isinstance(text, str):
        return told_apart(text, number)
    if text is None:
        return BadDocument(number, "`text` is null" if "text" in value else "the key `text` is missing")
    return BadDocument(number, f"`text` is {_JSON_TYPES[type(text)]}, not a string")


def _paragraph(lines: list[bytes], number: int, length: int) -> Record:
    if length > MAX_DOCUMENT_BYTES:
        return BadDocument(number, f"longer than {MAX_DOCUMENT_BYTES} bytes")
    texts = []
    for i, line in enumerate(lines):
        try:
            texts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            return BadDocument(number + i, not_utf8(error))
    return told_apart("\n".join(texts), number)
