"""From the recipe's data and tokenizer tables to what the loop and the evaluation read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockllm_cli.data.corpus import Corpora, Corpus, open_corpora
from blockllm_cli.data.rows import Rows
from blockllm_cli.data.stream import StreamSettings, rows_digest, validation_rows
from blockllm_cli.data.tokenizer import Tokenizer, load_tokenizer
from blockllm_cli.data.tokenizer_training import train_tokenizer
from blockllm_cli.methods.resolve import Resolved
from blockllm_cli.model.config import LlamaConfig, llama_config
from blockllm_cli.recipe.sections import Recipe
from blockllm_cli.tracking.run_folder import TOKENIZER, RunFolder
from blockllm_cli.tracking.terminal import Terminal


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
        train: training documents.
        tokenizer: fits the model, checked.
        config: of the model, with the vocabulary size decided.
        validation: the fixed validation rows.
        validation_sha256: of those rows.
        settings: how documents become rows.
        notices: events met while the validation rows were made, such as bad documents.
    """

    train: Corpus
    tokenizer: Tokenizer
    config: LlamaConfig
    validation: Rows
    validation_sha256: str
    settings: StreamSettings
    notices: list[dict[str, Any]]


def prepare_inputs(
    resolved: Resolved, folder: RunFolder | None, terminal: Terminal, should_stop: Callable[[], bool]
) -> Inputs:
    """Open the corpora, train or load the tokenizer, fix the validation rows.

    Args:
        resolved: the recipe.
        folder: a run that is resumed keeps its tokenizer; None for a new one.
        terminal: told of what takes long.
        should_stop: looked at everywhere that takes long.

    Raises:
        InputError: the data or the tokenizer cannot be used.
        RecipeError: tokenizer and model do not fit.
        StopRequested: a stop was asked for.
    """
    recipe = resolved.recipe
    corpora = _open(resolved, terminal, should_stop)
    tokenizer = _tokenizer(recipe, corpora, folder, terminal, should_stop)
    config = llama_config(recipe.model, tokenizer_vocab_size=tokenizer.vocab_size, error=resolved.loaded.error)
    settings = stream_settings(recipe)
    notices: list[dict[str, Any]] = []
    with terminal.working("tokenising the validation set"):
        rows = validation_rows(
            corpora.validation,
            tokenizer,
            settings,
            recipe.evaluate.tokens,
            report=notices.append,
            should_stop=should_stop,
        )
    digest = rows_digest(b"", rows).hex()
    targets = int(rows.targets_per_row().sum())
    terminal.say(f"validation: {len(rows)} rows, {targets:,} targets, sha256 {digest[:12]}")
    if targets < recipe.evaluate.tokens:
        terminal.say(f"note: evaluate.tokens asks for {recipe.evaluate.tokens:,} targets; the set has no more")
    return Inputs(corpora.train, tokenizer, config, rows, digest, settings, notices)


def stream_settings(recipe: Recipe) -> StreamSettings:
    """How documents become rows, from the data table."""
    data = recipe.data
    assert data.seed is not None  # filled when the recipe was resolved
    return StreamSettings(
        sequence_length=data.sequence_length,
        layout=data.layout,
        block_documents=data.block_documents,
        seed=data.seed,
        on_exhausted=data.on_exhausted,
        max_bad_documents=data.max_bad_documents,
        workers=data.workers,
    )


def _open(resolved: Resolved, terminal: Terminal, should_stop: Callable[[], bool]) -> Corpora:
    data = resolved.recipe.data
    cache = Path(data.cache) if data.cache else None
    if data.corpus == "builtin":
        with terminal.working("opening the builtin corpus (documentation of Python and of the packages installed)"):
            return open_corpora(data, cache=cache, should_stop=should_stop)
    return open_corpora(data, cache=cache, should_stop=should_stop)


def _tokenizer(
    recipe: Recipe,
    corpora: Corpora,
    folder: RunFolder | None,
    terminal: Terminal,
    should_stop: Callable[[], bool],
) -> Tokenizer:
    if folder is not None:
        return load_tokenizer(folder.path / TOKENIZER)
    wanted = recipe.tokenizer
    if wanted.source == "file":
        assert wanted.path is not None  # the schema asks for it
        return load_tokenizer(Path(wanted.path))
    assert wanted.vocab_size is not None  # filled when the recipe was resolved
    with terminal.working(f"training a tokenizer of {wanted.vocab_size:,} pieces ({wanted.kind})"):
        trained = train_tokenizer(
            corpora.train.texts(should_stop),
            vocab_size=wanted.vocab_size,
            kind=wanted.kind,
            sample_bytes=wanted.sample_bytes,
            seed=0,
            should_stop=should_stop,
        )
    tokenizer = Tokenizer(trained.model_bytes)
    terminal.say(f"tokenizer: {tokenizer.vocab_size:,} pieces, {_report(trained.report)}")
    return tokenizer


def _report(report: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in report.items() if isinstance(value, int))
