"""Tokenises the shards that a run will read, before it, once for all runs on them with the same tokenizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from blockllm_cli.data.blocks import StreamSettings, shard_order
from blockllm_cli.data.corpus import Corpora, Corpus
from blockllm_cli.data.prepared import lengths_of
from blockllm_cli.data.prepared_format import BAD, RECORD, RECORDS, Entry, tokens_folder
from blockllm_cli.data.prepared_need import RowCount
from blockllm_cli.data.prepared_writing import Preparation, discard
from blockllm_cli.data.shards import Shard
from blockllm_cli.data.stream import VALIDATION_SEED
from blockllm_cli.data.tokenizer import AnyTokenizer
from blockllm_cli.errors import InterruptedRunError, StopRequested
from blockllm_cli.methods.resolve import Resolved, resolve_recipe
from blockllm_cli.model.config import llama_config
from blockllm_cli.recipe.sections import Recipe
from blockllm_cli.recipe.steps import total_steps
from blockllm_cli.runner.inputs import cache_folder, opened_corpora, opened_tokenizer, stream_settings
from blockllm_cli.runner.machine import usable_cores
from blockllm_cli.runner.watchdog import Watchdog
from blockllm_cli.tracking.terminal import Terminal
from blockllm_cli.training.signals import StopFlag


@dataclass(frozen=True)
class PrepareRequest:
    """What the command line asks for.

    Attributes:
        recipe: file or name of a shipped recipe.
        overrides: `table.key=value` texts, later ones win.
        workers: processes that tokenise; None: one per core that this process may use.
        everything: all shards, and not those alone that the run will read.
        check: read what was prepared before, compare hashes, and make anew what is damaged.
    """

    recipe: str
    overrides: Sequence[str] = ()
    workers: int | None = None
    everything: bool = False
    check: bool = False


@dataclass
class PrepareReport:
    """What there is now, for this recipe.

    Attributes:
        folder: where the entries of this tokenizer are.
        tokenizer_sha256: of its pieces.
        shards: of the corpus, both sides.
        made: shards that were tokenised by this call.
        found: shards that were there.
        damaged: shards whose entry was found damaged, and made anew.
        rows: rows that the prepared training shards give in one pass, in whole blocks.
        rows_wanted: rows of the run.
        documents: good documents of the shards made and found.
        tokens: their ids.
        bytes: UTF-8 bytes of their text.
        empty: empty documents.
        bad: bad documents of these shards: file, line and reason.
        seconds: how long the call took, corpus and tokenizer not counted.
    """

    folder: str
    tokenizer_sha256: str
    shards: int
    rows_wanted: int
    made: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def count(self, shard: Shard, entry: Entry) -> None:
        """Add what an entry holds."""
        totals = entry.manifest.totals
        self.documents += totals.documents
        self.tokens += totals.tokens
        self.bytes += totals.bytes
        self.empty += totals.empty
        if totals.bad:
            records = np.fromfile(entry.folder / RECORDS, RECORD)
            lines = records["line"][records["kind"] == BAD].tolist()
            self.bad += [
                {"file": str(shard), "line": line, "reason": reason}
                for line, reason in zip(lines, entry.manifest.reasons, strict=True)
            ]


def prepare_data(request: PrepareRequest, terminal: Terminal) -> PrepareReport:
    """Prepare the shards that the recipe's run will read, in its order, until they give its rows.

    Raises:
        BlockLLMError: the recipe, the data, the tokenizer or the disk refuse.
        InterruptedRunError: a signal stopped it; finished shards stay.
    """
    resolved = resolve_recipe(request.recipe, overrides=request.overrides)
    report: PrepareReport | None = None
    with StopFlag(terminal) as stop:
        watchdog = Watchdog(stop, terminal.say, resolved.recipe.data.retry_seconds)
        try:
            corpora, tokenizer = _opened(resolved, terminal, watchdog)
            report = _empty_report(resolved.recipe, corpora, tokenizer)
            _Preparing(request, resolved.recipe, corpora, tokenizer, report, terminal, watchdog).run()
        except StopRequested as error:
            assert stop.signal_number is not None
            done = len(report.made) + len(report.found) if report else 0
            raise InterruptedRunError(
                f"stopped; {done} shards are prepared and stay; the same command goes on", stop.signal_number
            ) from error
    return report


def _opened(resolved: Resolved, terminal: Terminal, watchdog: Watchdog) -> tuple[Corpora, AnyTokenizer]:
    """Corpora and tokenizer as the run would open them, its refusals among what may come of it."""
    recipe = resolved.recipe
    corpora = opened_corpora(resolved, terminal, watchdog)
    tokenizer = opened_tokenizer(recipe, corpora, None, terminal, watchdog)
    llama_config(recipe.model, tokenizer_vocab_size=tokenizer.vocab_size, error=resolved.loaded.error)
    return corpora, tokenizer


def _empty_report(recipe: Recipe, corpora: Corpora, tokenizer: AnyTokenizer) -> PrepareReport:
    return PrepareReport(
        folder=str(tokens_folder(cache_folder(recipe), tokenizer)),
        tokenizer_sha256=tokenizer.sha256,
        shards=len({str(shard) for shard in (*corpora.train.shards, *corpora.validation.shards)}),
        rows_wanted=total_steps(recipe) * recipe.batch.rows,
    )


class _Preparing:
    """One call's work on the shards."""

    def __init__(
        self,
        request: PrepareRequest,
        recipe: Recipe,
        corpora: Corpora,
        tokenizer: AnyTokenizer,
        report: PrepareReport,
        terminal: Terminal,
        watchdog: Watchdog,
    ) -> None:
        self._request = request
        self._recipe = recipe
        self._corpora = corpora
        self._tokenizer = tokenizer
        self._report = report
        self._terminal = terminal
        self._watchdog = watchdog
        self._entries: dict[str, Entry] = {}

    def run(self) -> None:
        """Prepare the validation side, which a run reads first, then the training side."""
        started = time.perf_counter()
        settings = stream_settings(self._recipe)
        workers = self._request.workers
        wanted_rows, wanted_targets = self._report.rows_wanted, self._recipe.evaluate.tokens
        with Preparation(
            self._tokenizer,
            cache_folder(self._recipe),
            workers=usable_cores() if workers is None else workers,
            should_stop=self._watchdog,
        ) as preparation:
            self._cover(
                preparation,
                self._corpora.validation,
                settings,
                VALIDATION_SEED,
                lambda count: count.targets >= wanted_targets,
            )
            count = self._cover(
                preparation, self._corpora.train, settings, settings.seed, lambda count: count.rows >= wanted_rows
            )
        self._report.rows = count.rows
        self._report.seconds = time.perf_counter() - started

    def _cover(
        self,
        preparation: Preparation,
        corpus: Corpus,
        settings: StreamSettings,
        seed: int,
        is_enough: Callable[[RowCount], bool],
    ) -> RowCount:
        """Prepare shards of one side in the order of its first pass until `is_enough`."""
        count = RowCount(settings)
        order = shard_order(len(corpus.shards), seed, 0)
        for number, i in enumerate(order):
            if not self._request.everything and is_enough(count):
                break
            shard = corpus.shards[i]
            if str(shard) not in self._entries:
                self._entries[str(shard)] = self._entry(preparation, shard, f"{number + 1} of {len(order)}")
            count.add(lengths_of(self._entries[str(shard)], corpus.part))
        return count

    def _entry(self, preparation: Preparation, shard: Shard, place: str) -> Entry:
        entry, is_new = preparation.find(shard), False
        if entry is not None and self._request.check:
            try:
                with self._terminal.progress(f"checking what is prepared of {shard.name} ({place})"):
                    entry.check()
            except (ValueError, OSError) as error:
                self._terminal.warn(f"what is prepared of {shard.name} is made anew: {error}")
                self._report.damaged.append(str(shard))
                discard(entry)
                entry = None
        if entry is None:
            description = f"preparing {shard.name} ({place})"
            with self._terminal.progress(description, unit="documents") as step:
                entry, is_new = preparation.prepare(shard, step.advance)
        (self._report.made if is_new else self._report.found).append(str(shard))
        self._report.count(shard, entry)
        return entry
