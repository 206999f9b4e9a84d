"""The files of an exported model: weights, configurations, tokenizer, each as transformers expects to find it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockllm_cli.data.fast_tokenizer import TOKENIZER_CONFIG, TOKENIZER_JSON, FastTokenizer
from blockllm_cli.data.sentencepiece_file import read_sentencepiece
from blockllm_cli.data.tokenizer import AnyTokenizer
from blockllm_cli.data.tokenizer_json import tokenizer_json, with_opening
from blockllm_cli.durable import sync_file
from blockllm_cli.errors import InputError, StopRequested
from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.hf_config import CONFIG_FILE, config_json
from blockllm_cli.model.initial_weights import INDEX_FILE, WEIGHTS_FILE
from blockllm_cli.model.weights import save_tensors

SHARD_BYTES = 5 * 10**9
"""Weights beyond this are cut into several files, as the hub likes them."""

SENTENCEPIECE_FILE, GENERATION_CONFIG = "tokenizer.model", "generation_config.json"


@dataclass(frozen=True)
class TextMarks:
    """Which ids stand at the ends of a text, as the run's rows had them.

    Attributes:
        opening: id before a text; None where rows had none (`data.layout = "truncate"`).
        bos_id: id that is meant to begin a text; None if the tokenizer has none of its own and no row had one.
        eos_id: id that ends a text.
    """

    opening: int | None
    bos_id: int | None
    eos_id: int

    @classmethod
    def of(cls, tokenizer: AnyTokenizer, layout: str) -> TextMarks:
        """Those of rows in this layout."""
        opening = tokenizer.bos_id if layout == "pack" else None
        own = tokenizer.bos_id if tokenizer.bos_id != tokenizer.eos_id else None
        return cls(opening, own if opening is None else opening, tokenizer.eos_id)


def write_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    should_stop: Callable[[], bool],
    *,
    shard_bytes: int = SHARD_BYTES,
    wrote: Callable[[int], None] = lambda _: None,
) -> None:
    """Write `weights` in `dtype` as one safetensors file, or as several with an index.

    Args:
        folder: where.
        weights: parameter name -> tensor, on any device; one file's worth of copies exists at a time.
        dtype: of the stored tensors.
        should_stop: looked at before each file.
        shard_bytes: most bytes of tensors in one file; a larger tensor has one of its own.
        wrote: told of the bytes of each file.

    Raises:
        OSError: the disk refuses.
        StopRequested: `should_stop` became true.
    """
    groups = list(_groups(weights, dtype.itemsize, shard_bytes))
    count = len(groups)
    places: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        if should_stop():
            raise StopRequested
        file = WEIGHTS_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        save_tensors({name: weights[name].to("cpu", dtype) for name in names}, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(names, file))
        wrote(sum(weights[name].numel() * dtype.itemsize for name in names))
    if count > 1:
        total = sum(weight.numel() * dtype.itemsize for weight in weights.values())
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})


def _groups(weights: Mapping[str, Tensor], item_bytes: int, limit: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, in order."""
    names: list[str] = []
    held = 0
    for name, weight in weights.items():
        size = weight.numel() * item_bytes
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def write_configs(folder: Path, config: LlamaConfig, dtype: torch.dtype, positions: int, marks: TextMarks) -> None:
    """Write config.json and generation_config.json.

    Raises:
        OSError: the disk refuses.
    """
    word = str(dtype).removeprefix("torch.")
    content = config_json(config, dtype=word, positions=positions, bos_id=marks.bos_id, eos_id=marks.eos_id)
    _write_json(folder / CONFIG_FILE, content)
    _write_json(folder / GENERATION_CONFIG, {"bos_token_id": marks.bos_id, "eos_token_id": marks.eos_id})


def write_tokenizer(folder: Path, tokenizer: AnyTokenizer, positions: int, marks: TextMarks) -> str | None:
    """Write the files from which `AutoTokenizer` makes the tokenizer.

    Returns:
        Why there is no tokenizer.json, if the model cannot be said in that form; tokenizer.model is there all the same.

    Raises:
        OSError: the disk refuses.
    """
    problem = None
    if isinstance(tokenizer, FastTokenizer):
        opens_with_end = marks.bos_id == tokenizer.eos_id
        names = {
            "bos_token": tokenizer.eos_token if opens_with_end else tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
        }
        write_page(folder / TOKENIZER_JSON, with_opening(tokenizer.json_text, names["bos_token"], marks.opening))
    else:
        (folder / SENTENCEPIECE_FILE).write_bytes(tokenizer.model_bytes)
        sync_file(folder / SENTENCEPIECE_FILE)
        pieces = read_sentencepiece(tokenizer.model_bytes).pieces
        names = {
            "bos_token": None if marks.bos_id is None else pieces[marks.bos_id].text,
            "eos_token": pieces[marks.eos_id].text,
            "unk_token": next((piece.text for piece in pieces if piece.kind == "unknown"), None),
        }
        try:
            content = tokenizer_json(tokenizer.model_bytes, opening=marks.opening)
            write_page(folder / TOKENIZER_JSON, json.dumps(content, ensure_ascii=False, allow_nan=False))
        except InputError as error:
            problem = str(error)
    _write_json(
        folder / TOKENIZER_CONFIG,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: token for name, token in names.items() if token is not None},
            "clean_up_tokenization_spaces": False,
            "model_max_length": positions,
            # transformers 4 would otherwise give token types, which a Llama does not take.
            "model_input_names": ["input_ids", "attention_mask"],
            # A text that holds "</s>" is a text with five such characters, as it was in training.
            "split_special_tokens": True,
        },
    )
    return problem


def _write_json(path: Path, value: Any) -> None:
    write_page(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_page(path: Path, content: str) -> None:
    """Write a file of text, as UTF-8, and sync it.

    Raises:
        OSError: the disk refuses.
    """
    path.write_text(content, encoding="utf-8", newline="\n")
    sync_file(path)
