"""From the recipe's data and tokenizer tables to what the loop and the evaluation read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockllm_cli.data.corpus import Corpora, Corpus, open_corpora
from blockllm_cli.data.hub_tokenizer import hub_tokenizer_file
from blockllm_cli.data.rows import Rows
from blockllm_cli.data.stream import StreamSettings, rows_digest, validation_rows
from blockllm_cli.data.tokenizer import Tokenizer, load_tokenizer
from blockllm_cli.data.tokenizer_training import draw_sample, train_tokenizer
from blockllm_cli.hub.shards import HubShard
from blockllm_cli.methods.resolve import Resolved
from blockllm_cli.model.config import LlamaConfig, llama_config
from blockllm_cli.recipe.sections import Recipe
from blockllm_cli.runner.watchdog import Watchdog
from blockllm_cli.tracking.run_folder import TOKENIZER, RunFolder
from blockllm_cli.tracking.terminal import Terminal

_OPENING = {
    "builtin": "reading the builtin corpus",
    "files": "finding the files of the corpus",
    "c4": "asking the hub for the files of C4",
    "hub": "asking the hub for the files of the dataset",
}


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


def prepare_inputs(resolved: Resolved, folder: RunFolder | None, terminal: Terminal, watchdog: Watchdog) -> Inputs:
    """Open the corpora, train or load the tokenizer, fix the validation rows.

    Args:
        resolved: the recipe.
        folder: a run that is resumed keeps its tokenizer; None for a new one.
        terminal: told of what takes long.
        watchdog: asked everywhere that takes long whether to stop; has the link to the hub.

    Raises:
        InputError: the data or the tokenizer cannot be used.
        RecipeError: tokenizer and model do not fit.
        StopRequested: a stop was asked for.
    """
    recipe = resolved.recipe
    corpora = _open(resolved, terminal, watchdog)
    tokenizer = _tokenizer(recipe, corpora, folder, terminal, watchdog)
    config = llama_config(recipe.model, tokenizer_vocab_size=tokenizer.vocab_size, error=resolved.loaded.error)
    settings = stream_settings(recipe)
    notices = _origin(corpora.train)
    with terminal.progress("tokenising the validation set", total=recipe.evaluate.tokens, unit="targets") as step:
        rows = validation_rows(
            corpora.validation,
            tokenizer,
            settings,
            recipe.evaluate.tokens,
            report=notices.append,
            should_stop=watchdog,
            progress=step.update,
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


def _open(resolved: Resolved, terminal: Terminal, watchdog: Watchdog) -> Corpora:
    data = resolved.recipe.data
    cache = Path(data.cache) if data.cache else None
    with terminal.progress(_OPENING[data.corpus], unit="source files" if data.corpus == "builtin" else "") as step:
        return open_corpora(
            data, cache=cache, link=watchdog.link, say=terminal.say, should_stop=watchdog, progress=step.update
        )


def _tokenizer(
    recipe: Recipe,
    corpora: Corpora,
    folder: RunFolder | None,
    terminal: Terminal,
    watchdog: Watchdog,
) -> Tokenizer:
    if folder is not None:
        return load_tokenizer(folder.path / TOKENIZER)
    wanted = recipe.tokenizer
    if wanted.source == "file":
        assert wanted.path is not None  # the schema asks for it
        return load_tokenizer(Path(wanted.path))
    if wanted.source == "hub":
        assert wanted.path is not None
        with terminal.progress(f"fetching the tokenizer of {wanted.path}"):
            return load_tokenizer(hub_tokenizer_file(wanted.path, watchdog.link, watchdog))
    assert wanted.vocab_size is not None  # filled when the recipe was resolved
    with terminal.progress("reading text to train a tokenizer on", unit="bytes") as step:
        sample = draw_sample(
            corpora.train.texts(watchdog),
            sample_bytes=wanted.sample_bytes,
            seed=0,
            should_stop=watchdog,
            progress=step.update,
        )
    with terminal.progress(f"training a tokenizer of {wanted.vocab_size:,} pieces ({wanted.kind})"):
        trained = train_tokenizer(sample, vocab_size=wanted.vocab_size, kind=wanted.kind, should_stop=watchdog)
    tokenizer = Tokenizer(trained.model_bytes)
    terminal.say(f"tokenizer: {tokenizer.vocab_size:,} pieces, {_report(trained.report)}")
    return tokenizer


def _report(report: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in report.items() if isinstance(value, int))


def _origin(corpus: Corpus) -> list[dict[str, Any]]:
    """An event that says which commit of which dataset is read, if it comes from a hub."""
    first = corpus.shards[0]
    if not isinstance(first, HubShard):
        return []
    return [
        {
            "kind": "corpus",
            "repository": first.remote.repository,
            "commit": first.remote.commit,
            "shards": len(corpus.shards),
        }
    ]
