"""Tokenizers of a hub: the sentencepiece model, or else the tokenizer.json, beside the weights of a repository."""

from __future__ import annotations

from pathlib import Path

from blockllm_cli.data.fast_tokenizer import SPECIAL_TOKENS, TOKENIZER_CONFIG, TOKENIZER_JSON
from blockllm_cli.data.stopping import StopCheck
from blockllm_cli.errors import InputError
from blockllm_cli.hub.files import hub_file
from blockllm_cli.hub.link import Link

MODEL_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Names under which repositories keep a sentencepiece model: Llama's, T5's, XLM-R's."""


def hub_tokenizer_file(repository: str, link: Link, should_stop: StopCheck) -> Path:
    """The tokenizer's model file of a model repository, on disk.

    Args:
        repository: `owner/name`, such as google-t5/t5-base.
        link: to the hub.
        should_stop: looked at while the hub is waited for.

    Raises:
        InputError: no such repository, no tokenizer in it, or the hub is out of reach.
        StopRequested: `should_stop` became true.
    """
    for name in MODEL_FILES:
        found = hub_file(repository, name, kind="model", link=link, should_stop=should_stop)
        if found is not None:
            return found
    found = hub_file(repository, TOKENIZER_JSON, kind="model", link=link, should_stop=should_stop)
    if found is not None:
        # These say which tokens begin and end a text; they come to lie beside it.
        for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
            hub_file(repository, name, kind="model", link=link, should_stop=should_stop)
        return found
    raise InputError(
        f"tokenizer.path: {repository} holds no sentencepiece model ({', '.join(MODEL_FILES)}) and no "
        f"{TOKENIZER_JSON}; "
        'name another repository, or a file with tokenizer.source = "file"'
    )
