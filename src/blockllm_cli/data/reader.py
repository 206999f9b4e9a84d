"""Reads the documents of one shard and tells the good, the bad and the empty apart, whatever state the file is in.

Formats, decided by content where it can decide:

- parquet (its magic bytes): the column `text`; a row counts as a line.
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
from typing import Any, NamedTuple

from blockllm_cli.data.decompress import DamagedError, decompressed
from blockllm_cli.data.shards import Shard, local_path, opened, unreadable
from blockllm_cli.data.stopping import StopCheck, never
from blockllm_cli.errors import InputError, StopRequested

MAX_DOCUMENT_BYTES = 1 << 28
"""A line (or paragraph of a text file) above this is bad: reading stays bounded on files that are no lines at all."""

_BOM = b"\xef\xbb\xbf"
_PARQUET_MAGIC = b"PAR1"
_TEXT_NAME = re.compile(r"\.(txt|text|md)(\.gz|\.zst)?$", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")
# White space, controls, and the characters that Unicode calls default-ignorable: nothing of it leaves a mark.
_VISIBLE = re.compile(
    "[^\\s\0-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)
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

    In a parquet file both count rows.
    """

    line: int
    offset: int


class Document(NamedTuple):
    """A good document: the line it begins at (from 1), its text, and how many lone surrogates were replaced in it."""

    line: int
    text: str
    surrogates: int


class EmptyDocument(NamedTuple):
    """A document without a visible character."""

    line: int


class BadDocument(NamedTuple):
    """A document that cannot be used: its line, or 0 where the file as a whole is meant, and why."""

    line: int
    reason: str


Record = Document | EmptyDocument | BadDocument


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
                magic = file.read(len(_PARQUET_MAGIC))
            except OSError as error:
                raise unreadable(self.shard, error) from error
        if not magic:
            yield BadDocument(0, "the file is empty (0 bytes)")
        elif magic == _PARQUET_MAGIC:
            yield from self._parquet()
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

    def _parquet(self) -> Iterator[Record]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise InputError(
                f"{self.shard} is a parquet file, which needs a package that is not installed: pip install pyarrow"
            ) from error
        try:
            with parquet.ParquetFile(local_path(self.shard, self._should_stop)) as file:
                yield from self._parquet_rows(file, pyarrow)
        except (pyarrow.ArrowException, OSError) as error:
            yield BadDocument(self.position.line + 1, f"damaged parquet data ({error}); the rest of the file is lost")

    def _parquet_rows(self, file: Any, pyarrow: Any) -> Iterator[Record]:
        schema = file.schema_arrow
        if "text" not in schema.names:
            yield BadDocument(0, f"no column `text` (columns: {', '.join(schema.names)}); the file is left out")
            return
        kind = schema.field("text").type
        types = pyarrow.types
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
            yield BadDocument(0, f"the column `text` is of type {kind}, not string; the file is left out")
            return
        number = self.position.line
        groups = list(range(file.num_row_groups))
        unread = number
        while groups and unread >= file.metadata.row_group(groups[0]).num_rows:
            unread -= file.metadata.row_group(groups.pop(0)).num_rows
        for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=["text"]):
            if self._should_stop():
                raise StopRequested
            column = batch.column(0)
            for i in range(min(unread, len(column)), len(column)):
                number += 1
                self.position = Position(number, number)
                try:
                    text = column[i].as_py()
                except UnicodeDecodeError as error:
                    yield BadDocument(number, _not_utf8(error))
                    continue
                yield BadDocument(number, "`text` is null") if text is None else _told_apart(text, number)
            unread -= min(unread, len(column))


def _parsed(line: bytes, number: int) -> Record:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadDocument(number, _not_utf8(error))
    except json.JSONDecodeError as error:
        return BadDocument(number, f"not valid JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested by the thousand
        return BadDocument(number, f"not usable JSON: {error}")
    if not isinstance(value, dict):
        return BadDocument(number, f"{_JSON_TYPES.get(type(value), 'null')}, not an object with the key `text`")
    text = value.get("text")
    if isinstance(text, str):
        return _told_apart(text, number)
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
            return BadDocument(number + i, _not_utf8(error))
    return _told_apart("\n".join(texts), number)


def _told_apart(text: str, number: int) -> Record:
    """A good or an empty document, with lone surrogates replaced."""
    if not _VISIBLE.search(text):
        return EmptyDocument(number)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text, replaced = _SURROGATE.subn("\ufffd", text)
        return Document(number, text, replaced)
    return Document(number, text, 0)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start} of the text)"
