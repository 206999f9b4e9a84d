"""What a sentencepiece model file says: its pieces, and how text becomes them. Read without a protobuf library.

The library's own processor answers what a piece is, but neither which algorithm the model uses nor how it normalises
text. Field numbers are those of `sentencepiece_model.proto` of google/sentencepiece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from blockllm_cli.errors import InputError

PieceKind = Literal["normal", "unknown", "control", "user_defined", "unused", "byte"]

_KINDS: dict[int, PieceKind] = {
    1: "normal",
    2: "unknown",
    3: "control",
    4: "user_defined",
    5: "unused",
    6: "byte",
}
_ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class Piece:
    """One piece; its id is its place in the file."""

    text: str
    score: float
    kind: PieceKind


@dataclass(frozen=True)
class SentencePieceModel:
    """The content of a model file, as far as it decides the ids of a text.

    Attributes:
        pieces: in id order.
        algorithm: "unigram", "bpe", "word" or "char".
        byte_fallback: whether an unknown character is spelled in byte pieces.
        charsmap: compiled rules of normalisation; empty: none.
        add_dummy_prefix: whether a space is put before the text.
        remove_extra_whitespaces: whether runs of spaces become one, and those at the ends none.
        escape_whitespaces: whether a space is written as U+2581 in pieces.
        space_ends_piece: whether words carry their space behind them.
    """

    pieces: tuple[Piece, ...]
    algorithm: str
    byte_fallback: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    space_ends_piece: bool


def read_sentencepiece(model_bytes: bytes) -> SentencePieceModel:
    """Parse the content of a model file.

    Raises:
        InputError: it is cut short, or no message of this kind.
    """
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(model_bytes):
            if number == 1:
                pieces.append(_piece(dict(_fields(_message(value)))))
            elif number == 2:
                trainer = dict(_fields(_message(value)))
            elif number == 3:
                normalizer = dict(_fields(_message(value)))
    except (IndexError, ValueError, struct.error) as error:
        raise InputError(f"this is not a sentencepiece model, or it is damaged ({error})") from error
    # What a message leaves out has the default of its declaration: for trainer 3, "unigram"; for the spaces, true.
    return SentencePieceModel(
        pieces=tuple(pieces),
        algorithm=_ALGORITHMS.get(int(trainer.get(3, 1)), "unknown"),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=_message(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        space_ends_piece=bool(trainer.get(24, 0)),
    )


def _piece(fields: dict[int, int | bytes]) -> Piece:
    (score,) = struct.unpack("<f", _message(fields.get(2, bytes(4))))
    return Piece(_message(fields[1]).decode("utf-8", errors="replace"), score, _KINDS[int(fields.get(3, 1))])


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where a message is expected")
    return value


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of one message: varints as numbers, everything else as its bytes."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(content, place)
            yield number, value
            continue
        if wire == 2:
            length, place = _varint(content, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {place}")
        if place + length > len(content):
            raise ValueError(f"it ends within the field at byte {place}")
        yield number, content[place : place + length]
        place += length


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {place}")
