"""A `tokenizer.json`, the format of Hugging Face's `tokenizers`, behind the interface of `data.tokenizer.Tokenizer`.

Which of its tokens begin and end a text stands in other files beside it, so what is kept of one (`model_bytes`, the
`tokenizer.model` of a run) is one JSON object with all of it. The package is imported here only, where it is needed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockllm_cli.errors import InputError

TOKENIZER_JSON, TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"

_FORMAT = "blockllm-tokenizer-json-1"
_SURROGATE = re.compile("[\ud800-\udfff]")
# Parts of a tokenizer.json that do not change which ids a text has when no special token is asked for.
_WITHOUT_EFFECT = ("truncation", "padding", "post_processor")


class FastTokenizer:
    """One tokenizer.json; equal `sha256` means equal ids for equal text. It can be pickled.

    Text is only text: one that holds the name of a special token, such as `</s>`, is spelled out and not taken for it.

    Attributes:
        model_bytes: see the module.
        vocab_size: one more than the largest id.
        eos_id: id that ends a document.
        bos_id: id that begins a document; that of `eos_id` where there is none.
        unk_id: id of what the model has no pieces for; -1 where it has pieces for everything.

    Raises:
        InputError: the bytes are none of `packed`, the package `tokenizers` is missing, or refuses the file.
    """

    def __init__(self, model_bytes: bytes) -> None:
        self.model_bytes = model_bytes
        content = _object(model_bytes)
        if content is None or content.get("format") != _FORMAT:
            raise InputError("this is not a tokenizer that was kept from a tokenizer.json")
        self.json_text: str = content["tokenizer_json"]
        self._tokenizer = _opened(self.json_text)
        # Rows are cut and padded by us, and special tokens come from us alone.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = self._id_of(content["eos_token"])
        self.bos_token: str | None = content["bos_token"]
        self.eos_token: str = content["eos_token"]
        self.bos_id = self.eos_id if self.bos_token is None else self._id_of(self.bos_token)
        self.unk_id = self._unknown()

    def _unknown(self) -> int:
        model = (_object(self.json_text.encode("utf-8")) or {}).get("model", {})
        token = model.get("unk_token")  # unigram models have the id itself
        found = model.get("unk_id") if token is None else self._tokenizer.token_to_id(token)
        return -1 if found is None else int(found)

    def _id_of(self, token: str) -> int:
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None:
            raise InputError(f"the tokenizer.json has no token {token!r}, which the file beside it names")
        return found

    def __reduce__(self) -> tuple[type[FastTokenizer], tuple[bytes]]:
        return type(self), (self.model_bytes,)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Ids of each text, without bos and eos; one int32 array of shape (pieces,) per text.

        A lone surrogate, which UTF-8 cannot write, becomes U+FFFD. One thread is used: the library's own would also
        forbid that worker processes are made after it.
        """
        return [np.asarray(self._ids(text), dtype=np.int32) for text in texts]

    def _ids(self, text: str) -> list[int]:
        try:
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            encoded = self._tokenizer.encode(_SURROGATE.sub("\ufffd", text), add_special_tokens=False)
        ids: list[int] = encoded.ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens vanish, and so do ids past the vocabulary (a model may have more)."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        text: str = self._tokenizer.decode(known, skip_special_tokens=True)
        return text

    @cached_property
    def sha256(self) -> str:
        """Hex hash over all that decides ids, whatever the layout of the file."""
        content = json.loads(self.json_text)
        telling = {key: value for key, value in content.items() if key not in _WITHOUT_EFFECT}
        marks = {"bos_id": self.bos_id, "eos_id": self.eos_id}
        return hashlib.sha256(json.dumps([telling, marks], sort_keys=True).encode("utf-8")).hexdigest()


def is_json(content: bytes) -> bool:
    """Whether a tokenizer file is JSON; a sentencepiece model begins with another byte."""
    return content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


def packed(content: bytes, beside: Sequence[Path]) -> bytes:
    """`FastTokenizer.model_bytes` for a JSON file, which is a tokenizer.json or has been packed before.

    Args:
        content: of the file.
        beside: files that may name the tokens of begin and end, the first that does so counts: `tokenizer_config.json`
            and `special_tokens_map.json` as they come with a model; those that are missing are passed over.

    Raises:
        InputError: it is neither, or no file names a token that ends a text.
    """
    value = _object(content)
    if value is not None and value.get("format") == _FORMAT:
        return content
    if value is None or not isinstance(value.get("model"), dict):
        raise InputError("this is neither a sentencepiece model nor a tokenizer.json")
    found = [json_object for path in beside if path.is_file() and (json_object := _object(path.read_bytes()))]
    marks = {name: _first_token(found, name) for name in ("bos_token", "eos_token")}
    if marks["eos_token"] is None:
        raise InputError(
            f"no file says which token ends a text: put the {TOKENIZER_CONFIG} (or {SPECIAL_TOKENS}) that belongs to "
            "this tokenizer.json beside it, with its eos_token"
        )
    kept = {"format": _FORMAT, **marks, "tokenizer_json": content.decode("utf-8-sig")}
    return json.dumps(kept, ensure_ascii=False).encode("utf-8")


def _first_token(files: Sequence[dict[str, Any]], name: str) -> str | None:
    """The token of this name in the first file that has one: a string, or an object with it as `content`."""
    for file in files:
        token = file.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None


def _object(content: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _opened(text: str) -> Any:
    """The library's tokenizer.

    Raises:
        InputError: the library is missing, or refuses `text`.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(
            "a tokenizer.json needs the package tokenizers (pip install 'blockllm-cli[hf]'), a sentencepiece model none"
        ) from error
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library has no narrower class
        raise InputError(f"tokenizers {tokenizers.__version__} cannot read this tokenizer.json: {error}") from error
