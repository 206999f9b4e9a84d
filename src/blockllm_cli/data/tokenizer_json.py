"""A sentencepiece model as a `tokenizer.json`, the format that `tokenizers` and with it `transformers` read.

The file is written here as the plain JSON it is, so that an export needs neither package; where `tokenizers` is
installed the export compares ids. What has to be said so that they are equal:

- BPE. Sentencepiece joins the two neighbours that make the piece of highest score, the leftmost two of several;
  `tokenizers` has a ranked list of pairs, so every pair of pieces that makes a piece is listed under its score.
- Unigram. The same search over the same scores, in double where sentencepiece adds in single precision: of two
  segmentations that are equally likely, as in a run of one character, each library takes its own.
- Pieces that no text may become (`<s>`, `<0x0A>`) make no pair in BPE. In unigram they get a score that loses against
  all their letters, and where a letter has no piece, text is cut around such letters.
- The space before a text (`add_dummy_prefix`), which an empty text does not get, and spaces as U+2581.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from blockllm_cli.data.sentencepiece_file import Piece, SentencePieceModel, read_sentencepiece
from blockllm_cli.errors import InputError

SPACE = "\u2581"
"""How a space is written in pieces."""

_NEVER = -1e6  # a score below that of any segmentation of a piece's letters into others


def tokenizer_json(model_bytes: bytes, *, opening: int | None) -> dict[str, Any]:
    """The content of a `tokenizer.json` that gives the ids of the sentencepiece model `model_bytes`.

    Args:
        model_bytes: content of a sentencepiece model file.
        opening: id that is put before a text when special tokens are asked for; None: none.

    Raises:
        InputError: the model has what this format cannot say.
    """
    model = read_sentencepiece(model_bytes)
    _check_expressible(model)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": piece.text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, piece in enumerate(model.pieces)
            if piece.kind in ("control", "unknown")
        ],
        "normalizer": _sequence("normalizers", list(_normalizers(model))),
        "pre_tokenizer": _cut_at_unknown(model) if model.algorithm == "unigram" else None,
        "post_processor": None if opening is None else _template(model.pieces[opening].text, opening),
        "decoder": _sequence("decoders", list(_decoders(model))),
        "model": _bpe(model) if model.algorithm == "bpe" else _unigram(model),
    }


def with_opening(text: str, token: str | None, opening: int | None) -> str:
    """A tokenizer.json that puts before a text what training rows had there, and is otherwise the one it was.

    Args:
        text: content of a tokenizer.json.
        token: with the id `opening`.
        opening: id that is put before a text when special tokens are asked for; None: none.
    """
    content = json.loads(text)
    wanted = None if opening is None or token is None else _template(token, opening)
    if content.get("post_processor") == wanted:
        return text
    return json.dumps(content | {"post_processor": wanted}, ensure_ascii=False)


def _check_expressible(model: SentencePieceModel) -> None:
    if model.algorithm not in ("bpe", "unigram"):
        raise InputError(f"a sentencepiece model of kind {model.algorithm!r} cannot be written as tokenizer.json")
    if model.space_ends_piece or not model.escape_whitespaces:
        raise InputError("a sentencepiece model with unusual spaces cannot be written as tokenizer.json")
    for piece in model.pieces:
        if piece.kind in ("user_defined", "unused"):
            raise InputError(
                f"the sentencepiece model has the {piece.kind.replace('_', '-')} piece {piece.text!r}, which "
                "tokenizer.json cannot say so that ids stay equal"
            )


def _cut_at_unknown(model: SentencePieceModel) -> dict[str, Any] | None:
    """Cut text around unknown characters, if the name of a piece that no text may become has one in it.

    A run of them is one unknown, so it stays whole, unless each is spelled in bytes. No piece goes over such a cut, so
    it changes nothing else. None: not needed, or not possible, since a piece has a character without a piece of its
    own, which sentencepiece's training never makes.
    """
    normal = [piece.text for piece in model.pieces if piece.kind == "normal"]
    known = {text for text in normal if len(text) == 1}
    reserved = {letter for piece in model.pieces if piece.kind != "normal" for letter in piece.text}
    if reserved <= known or not all(known.issuperset(text) for text in normal):
        return None
    letters = "".join(f"\\x{{{ord(letter):x}}}" for letter in sorted(known))
    unknown = f"[^{letters}]" + ("" if model.byte_fallback else "+")
    return {"type": "Split", "pattern": {"Regex": unknown}, "behavior": "Isolated", "invert": False}


def _normalizers(model: SentencePieceModel) -> Iterator[dict[str, Any]]:
    if model.charsmap:
        yield {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode("ascii")}
    if model.remove_extra_whitespaces:
        yield {"type": "Replace", "pattern": {"Regex": "^ +| +$"}, "content": ""}
        yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    if model.add_dummy_prefix:
        yield {"type": "Prepend", "prepend": SPACE}
    yield {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _decoders(model: SentencePieceModel) -> Iterator[dict[str, Any]]:
    yield {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    if model.byte_fallback:
        yield {"type": "ByteFallback"}
    yield {"type": "Fuse"}
    if model.add_dummy_prefix:
        yield {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _sequence(name: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", name: parts}


def _template(token: str, token_id: int) -> dict[str, Any]:
    """Put `token` before a text, and between the two of a pair."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _unknown(model: SentencePieceModel) -> int:
    return next(index for index, piece in enumerate(model.pieces) if piece.kind == "unknown")


def _bpe(model: SentencePieceModel) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[_unknown(model)].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.text: index for index, piece in enumerate(model.pieces)},
        "merges": [list(pair) for pair in _merges(model.pieces)],
    }


def _merges(pieces: Sequence[Piece]) -> Iterator[tuple[str, str]]:
    """Every pair of pieces that makes a piece, by falling score of the piece: the order in which pairs are joined."""
    ranked = sorted((-piece.score, index, piece.text) for index, piece in enumerate(pieces) if piece.kind == "normal")
    known = {text for _, _, text in ranked}
    for _, _, text in ranked:
        for cut in range(1, len(text)):
            if text[:cut] in known and text[cut:] in known:
                yield text[:cut], text[cut:]


def _unigram(model: SentencePieceModel) -> dict[str, Any]:
    # An infinity has no form in JSON; models without one of a score (user-made) have finite ones anyway.
    scores = [piece.score if piece.kind == "normal" else _NEVER for piece in model.pieces]
    if not all(math.isfinite(score) for score in scores):
        raise InputError("the sentencepiece model has a score that is not finite, which tokenizer.json cannot say")
    return {
        "type": "Unigram",
        "unk_id": _unknown(model),
        "byte_fallback": model.byte_fallback,
        "vocab": [[piece.text, score] for piece, score in zip(model.pieces, scores, strict=True)],
    }
