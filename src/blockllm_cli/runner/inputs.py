"""From the recipe's data and tokenizer tables to what the loop and the evaluation read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockllm_cli.data.cache import default_cache_dir
from blockllm_cli.data.corpus import Corpora, Corpus, open_corpora
from blockllm_cli.data.hub_tokenizer import hub_tokenizer_file
from blockllm_cli.data.prepared import PreparedShards, find_prepared
from blockllm_cli.data.rows import Rows
from blockllm_cli.data.stream import StreamSettings, rows_digest, validation_rows
from blockllm_cli.data.tokenizer import AnyTokenizer, Tokenizer, load_tokenizer
from blockllm_cli.data.tokenizer_cache import keep_tokenizer, kept_tokenizer, tokenizer_place
from blockllm_cli.data.tokenizer_training import TrainedTokenizer, draw_sample, train_tokenizer
from blockllm_cli.errors import StorageError
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

_PROBLEMS_SHOWN = 3
_SAMPLE_SEED = 0


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
        prepared: shards whose ids are read in place of their text.
        notices: events met while the validation rows were made, such as bad documents.
    """

    train: Corpus
    tokenizer: AnyTokenizer
    config: LlamaConfig
    validation: Rows
    validation_sha256: str
    settings: StreamSettings
    prepared: PreparedShards
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
    corpora = opened_corpora(resolved, terminal, watchdog)
    tokenizer = opened_tokenizer(recipe, corpora, folder, terminal, watchdog)
    config = llama_config(recipe.model, tokenizer_vocab_size=tokenizer.vocab_size, error=resolved.loaded.error)
    settings = stream_settings(recipe)
    prepared = prepared_shards(recipe, corpora, tokenizer, terminal)
    notices = _origin(corpora.train)
    with terminal.progress("tokenising the validation set", total=recipe.evaluate.tokens, unit="targets") as step:
        rows = validation_rows(
            corpora.validation,
            tokenizer,
            settings,
            recipe.evaluate.tokens,
            report=notices.append,
            should_stop=watchdog,
            prepared=prepared,
            progress=step.update,
        )
    digest = rows_digest(b"", rows).hex()
    targets = int(rows.targets_per_row().sum())
    terminal.say(f"validation: {len(rows)} rows, {targets:,} targets, sha256 {digest[:12]}")
    if targets < recipe.evaluate.tokens:
        terminal.say(f"note: evaluate.tokens asks for {recipe.evaluate.tokens:,} targets; the set has no more")
    return Inputs(corpora.train, tokenizer, config, rows, digest, settings, prepared, notices)


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


def cache_folder(recipe: Recipe) -> Path:
    """Where what is made once is kept: `data.cache`, else the user's."""
    return Path(recipe.data.cache) if recipe.data.cache else default_cache_dir()


def opened_corpora(resolved: Resolved, terminal: Terminal, watchdog: Watchdog) -> Corpora:
    """The two sides of the recipe's data; see `prepare_inputs`."""
    data = resolved.recipe.data
    cache = cache_folder(resolved.recipe)
    with terminal.progress(_OPENING[data.corpus], unit="source files" if data.corpus == "builtin" else "") as step:
        return open_corpora(
            data, cache=cache, link=watchdog.link, say=terminal.say, should_stop=watchdog, progress=step.update
        )


def prepared_shards(recipe: Recipe, corpora: Corpora, tokenizer: AnyTokenizer, terminal: Terminal) -> PreparedShards:
    """The shards that `blockllm data prepare` has tokenised, and a line about them; no network is needed."""
    shards = list(dict.fromkeys([*corpora.train.shards, *corpora.validation.shards]))
    prepared = find_prepared(shards, tokenizer, cache_folder(recipe), terminal.warn)
    for problem in prepared.problems[:_PROBLEMS_SHOWN]:
        terminal.warn(problem)
    if len(prepared.problems) > _PROBLEMS_SHOWN:
        terminal.warn(f"so it is with {len(prepared.problems) - _PROBLEMS_SHOWN} more")
    if prepared.entries:
        terminal.say(f"{len(prepared.entries)} of {len(shards)} shards are prepared: token ids are read, not text")
    return prepared


def opened_tokenizer(
    recipe: Recipe,
    corpora: Corpora,
    folder: RunFolder | None,
    terminal: Terminal,
    watchdog: Watchdog,
) -> AnyTokenizer:
    """The tokenizer of the recipe, or of the run in `folder`; see `prepare_inputs`."""
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
    return _trained(recipe, corpora.train, terminal, watchdog)


def _trained(recipe: Recipe, corpus: Corpus, terminal: Terminal, watchdog: Watchdog) -> Tokenizer:
    """A tokenizer trained on `corpus`, now or by an earlier run: training is repeatable, so the two are equal."""
    wanted = recipe.tokenizer
    asked = {
        "vocab_size": wanted.vocab_size,
        "kind": wanted.kind,
        "sample_bytes": wanted.sample_bytes,
        "seed": _SAMPLE_SEED,
    }
    place = tokenizer_place(cache_folder(recipe), corpus, asked)
    trained = kept_tokenizer(place)
    origin = "trained now" if trained is None else "trained before on the same text"
    if trained is None:
        trained = _newly_trained(recipe, corpus, terminal, watchdog)
        try:
            keep_tokenizer(place, trained)
        except StorageError as error:  # the run can do without
            terminal.warn(f"the tokenizer is not kept for other runs: {error}")
    tokenizer = Tokenizer(trained.model_bytes)
    terminal.say(f"tokenizer: {tokenizer.vocab_size:,} pieces, {origin}, {_report(trained.report)}")
    return tokenizer


def _newly_trained(recipe: Recipe, corpus: Corpus, terminal: Terminal, watchdog: Watchdog) -> TrainedTokenizer:
    wanted = recipe.tokenizer
    assert wanted.vocab_size is not None  # filled when the recipe was resolved
    with terminal.progress("reading text to train a tokenizer on", unit="bytes") as step:
        sample = draw_sample(
            corpus.texts(watchdog),
            sample_bytes=wanted.sample_bytes,
            seed=_SAMPLE_SEED,
            should_stop=watchdog,
            progress=step.update,
        )
    with terminal.progress(f"training a tokenizer of {wanted.vocab_size:,} pieces ({wanted.kind})"):
        return train_tokenizer(sample, vocab_size=wanted.vocab_size, kind=wanted.kind, should_stop=watchdog)


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
