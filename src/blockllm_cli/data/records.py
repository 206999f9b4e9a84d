"""What is met in a shard: good, empty and bad documents, and how a text is told to be one."""

from __future__ import annotations

import re
from typing import NamedTuple

_SURROGATE = re.compile("[\ud800-\udfff]")
# White space, controls, and the characters that Unicode calls default-ignorable: nothing of it leaves a mark.
_VISIBLE = re.compile(
    "[^\\s\0-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)


class Document(NamedTuple):
    """A good document: the line it begins at (from 1), its text, and how many lone surrogates were replaced in it."""

    line: int
    text: str
    surrogates: int

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode("utf-8"))


class EmptyDocument(NamedTuple):
    """A document without a visible character."""

    line: int


class BadDocument(NamedTuple):
    """A document that cannot be used: its line, or 0 where the file as a whole is meant, and why."""

    line: int
    reason: str


Record = Document | EmptyDocument | BadDocument


def told_apart(text: str, number: int) -> Record:
    """A good or an empty document, with lone surrogates replaced."""
    if not _VISIBLE.search(text):
        return EmptyDocument(number)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text, replaced = _SURROGATE.subn("\ufffd", text)
        return Document(number, text, replaced)
    return Document(number, text, 0)


def not_utf8(error: UnicodeDecodeError) -> str:
    """Why a document is bad whose bytes cannot be decoded."""
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start} of the text)"
