"""Text as it may be printed: what file names and other people's messages bring along cannot move a cursor."""

from __future__ import annotations

_LINES = frozenset("\n\t")
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in _LINES} | {
    ord("\r"): "\\r"
}


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates spelled out, lines and tabs as they are."""
    return text.translate(_CONTROL).encode("utf-8", errors="backslashreplace").decode("utf-8")
