"""A tokenizer that tests can read: one piece a word, by its place in a fixed list, or by hash beyond that."""

from __future__ import annotations

import multiprocessing
import sys
import zlib

import numpy as np


class WordTokenizer:
    bos_id = 1
    eos_id = 2
    vocab_size = 1000

    def __init__(self, model_bytes: bytes = b"words") -> None:
        assert model_bytes.startswith(b"words"), "a worker was given other bytes"
        self.model_bytes = model_bytes

    def encode(self, texts):
        return [
            np.array([3 + zlib.crc32(word.encode()) % (self.vocab_size - 3) for word in text.split()], np.int32)
            for text in texts
        ]


class FailingTokenizer(WordTokenizer):
    """Raises at a document that says so."""

    def encode(self, texts):
        if any("poison" in text for text in texts):
            raise ValueError("this tokenizer fails on purpose")
        return super().encode(texts)


class TorchFreeTokenizer(WordTokenizer):
    """Refuses to be made where torch is loaded, except in the process of the test."""

    def __init__(self, model_bytes: bytes = b"words") -> None:
        super().__init__(model_bytes)
        if multiprocessing.parent_process() is not None:
            assert multiprocessing.get_start_method() == "spawn", "not spawned"
            assert "torch" not in sys.modules, "torch is loaded in a worker"
