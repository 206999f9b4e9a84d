"""A sentencepiece model as the rest of the program sees it: text in, int32 ids out, an identity that can be compared.

Models come from a file or from `tokenizer_training`. The papers' T5 model (32,000 pieces, unigram) and Llama's (BPE
with byte fallback) are both such files. A tokenizer.json, the other form in use, is read by `fast_tokenizer`.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from blockllm_cli.data.fast_tokenizer import SPECIAL_TOKENS, TOKENIZER_CONFIG, FastTokenizer, is_json, packed
from blockllm_cli.errors import InputError

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """One sentencepiece model; equal `sha256` means equal ids for equal text.

    It can be pickled, so that worker processes can have it.

    Attributes:
        model_bytes: the model file's content; `tokenizer.model` of a run holds exactly these.
        vocab_size: number of pieces; ids are 0 .. vocab_size - 1.
        eos_id: id that ends a document.
        bos_id: id that begins a document. A model without one (T5) has none to spend: its `eos_id` stands here, so that
            between two documents there is always the same mark.
        unk_id: id of what the model has no pieces for.

    Raises:
        InputError: the bytes are no sentencepiece model, or the model has no piece that ends a text.
    """

    def __init__(self, model_bytes: bytes) -> None:
        # The library takes empty bytes for "load later" and then logs an error with every call.
        if not model_bytes:
            raise InputError("the tokenizer model is empty")
        self.model_bytes = model_bytes
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_bytes)
        except RuntimeError as error:
            raise InputError("this is not a sentencepiece model, or it is damaged") from error
        self.vocab_size: int = self._processor.get_piece_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise InputError("the tokenizer model has no piece that ends a text (eos), which training needs")
        bos_id = self._processor.bos_id()
        self.bos_id: int = bos_id if bos_id >= 0 else self.eos_id
        self.unk_id: int = self._processor.unk_id()

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes]]:
        return type(self), (self.model_bytes,)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Ids of each text, without bos and eos; one int32 array of shape (pieces,) per text.

        Any string is accepted: a lone surrogate, which UTF-8 cannot write, becomes U+FFFD. One thread is used; workers
        are the way to more.
        """
        try:
            encoded = self._processor.encode(list(texts), out_type=int, num_threads=1)
        except (TypeError, RuntimeError, UnicodeEncodeError):
            whole = [_SURROGATE.sub("\ufffd", text) for text in texts]
            encoded = self._processor.encode(whole, out_type=int, num_threads=1)
        return [np.asarray(ids, dtype=np.int32) for ids in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bos and eos vanish, and ids past the vocabulary (a model may have more) read as unknown."""
        known = [int(i) if 0 <= i < self.vocab_size else self.unk_id for i in ids]
        text: str = self._processor.decode(known)
        return text

    @cached_property
    def sha256(self) -> str:
        """Hex hash over pieces, scores and types in id order.

        The file's own bytes would not do: they also hold how the model was trained, down to the number of threads.
        User-defined pieces count as normal ones, since the library does not tell them apart.
        """
        processor, digest = self._processor, hashlib.sha256()
        kinds = {
            "unknown": processor.is_unknown,
            "control": processor.is_control,
            "unused": processor.is_unused,
            "byte": processor.is_byte,
        }
        for i in range(self.vocab_size):
            kind = next((name for name, holds in kinds.items() if holds(i)), "normal")
            piece = processor.id_to_piece(i).encode("utf-8", errors="replace")
            digest.update(struct.pack("<If", len(piece), processor.get_score(i)) + piece + kind.encode("ascii"))
        return digest.hexdigest()


AnyTokenizer = Tokenizer | FastTokenizer
"""What `load_tokenizer` gives: both have the same attributes and methods."""


def load_tokenizer(path: Path) -> AnyTokenizer:
    """The tokenizer in the file at `path`: a sentencepiece model, or a tokenizer.json, told by their content.

    A tokenizer.json needs a `tokenizer_config.json` or `special_tokens_map.json` beside it, which names the token that
    ends a text; `tokenizer.model` of a run holds all of it.

    Raises:
        InputError: there is no such file, it cannot be read, or it is no usable tokenizer; the message names the path.
    """
    try:
        content = path.read_bytes()
        if is_json(content):
            content = packed(content, [path.with_name(TOKENIZER_CONFIG), path.with_name(SPECIAL_TOKENS)])
            return FastTokenizer(content)
        return Tokenizer(content)
    except FileNotFoundError:
        raise InputError(f"tokenizer model {path}: there is no such file") from None
    except OSError as error:
        raise InputError(f"tokenizer model {path}: cannot be read ({error.strerror})") from error
    except InputError as error:
        raise InputError(f"tokenizer model {path}: {error}") from error
