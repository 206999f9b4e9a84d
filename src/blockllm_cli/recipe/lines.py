"""Where each key of a TOML text stands. `tomllib` gives values without positions, so that errors need this scanner."""

from __future__ import annotations

import tomllib
from collections.abc import Callable

Key = tuple[str, ...]

_BLANK = " \t"
_SPACE = " \t\r\n"


def key_lines(text: str) -> dict[Key, int]:
    """Line (from 1) of every key and table header of `text`, which must be valid TOML.

    Keys are full paths: `("batch", "rows")` for `rows` under `[batch]`, for `batch.rows` at the top and for
    `batch = {rows = 1}` alike. A table has the line of its header, or of the first key that implies it.
    """
    return _Scanner(text).scan()


class _Scanner:
    """One walk over the text; it only has to find keys and to skip values, since `tomllib` has judged the rest."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Key, int] = {}

    def scan(self) -> dict[Key, int]:
        table: Key = ()
        while self._skip_space_and_comments():
            if self.text[self.at] == "[":
                start = self.at
                while self.text[self.at] in "[" + _BLANK:
                    self.at += 1
                table = self._key()
                self._record((), table, start)
                self._skip_line()
            else:
                self._pair(table)
        return self.lines

    def _record(self, table: Key, key: Key, at: int) -> None:
        line = self.text.count("\n", 0, at) + 1
        for length in range(1, len(key) + 1):
            self.lines.setdefault((*table, *key[:length]), line)

    def _skip_space_and_comments(self) -> bool:
        """Move to the next significant character; False at the end of the text."""
        while self.at < len(self.text):
            character = self.text[self.at]
            if character == "#":
                self._skip_line()
            elif character in _SPACE:
                self.at += 1
            else:
                return True
        return False

    def _skip_line(self) -> None:
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end

    def _skip_blank(self) -> None:
        while self.at < len(self.text) and self.text[self.at] in _BLANK:
            self.at += 1

    def _key(self) -> Key:
        """Read a key of one or more parts, each bare or quoted, joined by dots."""
        parts: list[str] = []
        while True:
            self._skip_blank()
            start = self.at
            if self.text[start] in "\"'":
                self._skip_string()
                parts.append(tomllib.loads(f"part = {self.text[start : self.at]}")["part"])
            else:
                while self.text[self.at] not in _BLANK + ".=]":
                    self.at += 1
                parts.append(self.text[start : self.at])
            self._skip_blank()
            if self.text[self.at] != ".":
                return tuple(parts)
            self.at += 1

    def _pair(self, table: Key) -> None:
        start = self.at
        key = self._key()
        self._record(table, key, start)
        self.at += 1  # the equals sign
        self._skip_blank()
        self._value((*table, *key))

    def _value(self, key: Key) -> None:
        character = self.text[self.at]
        if character in "\"'":
            self._skip_string()
        elif character == "[":
            self._items("]", lambda: self._value(key))
        elif character == "{":
            self._items("}", lambda: self._pair(key))
        else:
            while self.at < len(self.text) and self.text[self.at] not in ",]}#\n":
                self.at += 1

    def _items(self, end: str, read: Callable[[], None]) -> None:
        """Read what stands between brackets, separated by commas, over any number of lines."""
        self.at += 1
        while self._skip_space_and_comments() and self.text[self.at] != end:
            if self.text[self.at] == ",":
                self.at += 1
            else:
                read()
        self.at += 1

    def _skip_string(self) -> None:
        """Move behind the string that starts here; a backslash escapes only between double quotes."""
        quote = self.text[self.at]
        fence = quote * 3 if self.text.startswith(quote * 3, self.at) else quote
        self.at += len(fence)
        while not self.text.startswith(fence, self.at):
            self.at += 2 if quote == '"' and self.text[self.at] == "\\" else 1
        self.at += len(fence)
        while len(fence) == 3 and self.text.startswith(quote, self.at):  # up to two quotes may precede the fence
            self.at += 1
