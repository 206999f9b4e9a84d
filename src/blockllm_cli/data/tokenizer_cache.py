"""Trained tokenizers that are kept, so that the next run on the same text need not train its own.

Training is repeatable, so a run with a kept tokenizer is the run that trains it anew, to the bit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import sentencepiece

from blockllm_cli.data import tokenizer_training
from blockllm_cli.data.corpus import Corpus
from blockllm_cli.data.tokenizer_training import TrainedTokenizer
from blockllm_cli.durable import storage_errors, write_bytes, write_json

VERSION = 1
"""Part of every key: raise it with a change of the reader, of the sample or of the training."""

_KEY_CHARACTERS = 32


def tokenizer_place(cache: Path, corpus: Corpus, settings: dict[str, Any]) -> Path:
    """The file in which a tokenizer trained on `corpus` with these settings is kept.

    The key is over the content of the corpus, as far as `Corpus.fingerprint` looks at it, and the times of its local
    files, since the fingerprint looks at their ends only: a copy is trained on anew, a change is never overlooked.

    Args:
        cache: folder of the cache.
        corpus: the training side.
        settings: the keywords of `train_tokenizer` that decide the model.

    Raises:
        InputError: a file of the corpus is gone.
    """
    fingerprint = corpus.fingerprint()
    times = [shard.stat().st_mtime_ns if isinstance(shard, Path) else 0 for shard in corpus.shards]
    made_by = [VERSION, sentencepiece.__version__, tokenizer_training.TRAINER_THREADS]
    key = json.dumps([made_by, fingerprint, times, settings], sort_keys=True)
    return cache / "tokenizers" / f"{hashlib.sha256(key.encode()).hexdigest()[:_KEY_CHARACTERS]}.json"


def kept_tokenizer(place: Path) -> TrainedTokenizer | None:
    """The tokenizer kept at `place`; None if there is none, or it is not what was written."""
    try:
        kept = json.loads(place.read_bytes())
        model = place.with_suffix(".model").read_bytes()
        return TrainedTokenizer(model, kept["report"]) if hashlib.sha256(model).hexdigest() == kept["sha256"] else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def keep_tokenizer(place: Path, trained: TrainedTokenizer) -> None:
    """Keep `trained` for `kept_tokenizer`.

    Raises:
        StorageError: the cache cannot be written.
    """
    with storage_errors(place, "write"):
        place.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(place.with_suffix(".model"), trained.model_bytes)
    # Last, so that a description always speaks of a whole file.
    write_json(place, {"sha256": hashlib.sha256(trained.model_bytes).hexdigest(), "report": trained.report})
