"""One block of a run's rows, as a person can read it: which text, where documents begin and end, what is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from blockllm_cli.data.blocks import StreamSettings, TextBlock, document_order, encoded, lay_out, read_blocks
from blockllm_cli.data.corpus import Corpus
from blockllm_cli.data.prepared import PreparedShards
from blockllm_cli.data.rows import PADDING, Rows
from blockllm_cli.data.stopping import StopCheck
from blockllm_cli.data.tokenizer import AnyTokenizer
from blockllm_cli.errors import InterruptedRunError, RecipeError, StopRequested
from blockllm_cli.methods.resolve import resolve_recipe
from blockllm_cli.runner.inputs import opened_corpora, opened_tokenizer, prepared_shards, stream_settings
from blockllm_cli.runner.watchdog import Watchdog
from blockllm_cli.tracking.terminal import Terminal
from blockllm_cli.training.signals import StopFlag


@dataclass(frozen=True)
class Stretch:
    """What a row holds of one document.

    Attributes:
        document: `shard:line`.
        text: decoded.
        pieces: number of ids, BOS and EOS among them.
        begins: whether the BOS of the document is in this row.
        ends: whether its EOS is.
    """

    document: str
    text: str
    pieces: int
    begins: bool
    ends: bool


@dataclass(frozen=True)
class ShownRow:
    """One row.

    Attributes:
        number: in its block.
        targets: positions that are learned from.
        padding: positions without a piece.
        stretches: its documents.
    """

    number: int
    targets: int
    padding: int
    stretches: list[Stretch]


@dataclass(frozen=True)
class BlockView:
    """A block, counted, and some of its rows.

    Attributes:
        epoch: from 0.
        block: number in its epoch, from 0.
        is_last: whether the epoch ends with it.
        sequence_length: input positions of a row.
        documents: good documents.
        without_target: those of them that are in no row.
        empty: empty documents met.
        bad: bad documents met: file, line and reason.
        surrogates: lone surrogates replaced.
        rows: rows made of the documents.
        targets: positions of these that are learned from.
        fill: share of their positions that is no padding.
        tokens: ids of the documents, cut off or not, without BOS and EOS.
        bytes: UTF-8 bytes of the documents.
        unknown: ids among `tokens` that stand for text the tokenizer has no pieces for.
        shown: the rows that were asked for.
    """

    epoch: int
    block: int
    is_last: bool
    sequence_length: int
    documents: int
    without_target: int
    empty: int
    bad: list[dict[str, Any]]
    surrogates: int
    rows: int
    targets: int
    fill: float
    tokens: int
    bytes: int
    unknown: int
    shown: list[ShownRow]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def inspect_data(
    recipe: str, *, overrides: Sequence[str], epoch: int, block: int, rows: int, terminal: Terminal
) -> BlockView:
    """Make one block of the recipe's training rows, and describe it.

    Args:
        recipe: file or name of a shipped recipe.
        overrides: `table.key=value` texts.
        epoch: which pass, from 0.
        block: which block of it, from 0; those before it are read and not tokenised.
        rows: how many rows are described.
        terminal: told of what takes long.

    Raises:
        BlockLLMError: the recipe, the data or the tokenizer cannot be used, or there is no such block.
        InterruptedRunError: a signal stopped it.
    """
    resolved = resolve_recipe(recipe, overrides=overrides)
    with StopFlag(terminal) as stop:
        watchdog = Watchdog(stop, terminal.say, resolved.recipe.data.retry_seconds)
        try:
            corpora = opened_corpora(resolved, terminal, watchdog)
            tokenizer = opened_tokenizer(resolved.recipe, corpora, None, terminal, watchdog)
            prepared = prepared_shards(resolved.recipe, corpora, tokenizer, terminal)
            settings = stream_settings(resolved.recipe)
            with terminal.progress(f"reading block {block} of epoch {epoch}"):
                found = _block(corpora.train, settings, epoch, block, prepared, watchdog)
                return _view(found, settings, tokenizer, rows, watchdog)
        except StopRequested as error:
            assert stop.signal_number is not None
            raise InterruptedRunError("stopped; nothing was written", stop.signal_number) from error


def _block(
    corpus: Corpus, settings: StreamSettings, epoch: int, number: int, prepared: PreparedShards, should_stop: StopCheck
) -> TextBlock:
    blocks = read_blocks(corpus, settings=settings, epoch=epoch, prepared=prepared, should_stop=should_stop)
    last = -1
    for block in blocks:
        if block.index == number:
            return block
        last = block.index
    raise RecipeError(f"--block {number}: the training data have blocks 0 to {last} of {settings.block_documents}")


def _view(
    block: TextBlock, settings: StreamSettings, tokenizer: AnyTokenizer, shown: int, should_stop: StopCheck
) -> BlockView:
    order = document_order(len(block.texts), settings.seed, block.epoch, block.index)
    documents = list(encoded([block.texts[i] for i in order], tokenizer, should_stop))
    built = lay_out(documents, [block.labels[i] for i in order], tokenizer, settings)
    rows = built.rows
    inputs = rows.documents[:, : rows.sequence_length]
    return BlockView(
        epoch=block.epoch,
        block=block.index,
        is_last=block.is_last,
        sequence_length=rows.sequence_length,
        documents=built.documents,
        without_target=built.without_target,
        empty=block.empty,
        bad=[{"file": file, "line": document.line, "reason": document.reason} for file, document in block.bad],
        surrogates=block.surrogates,
        rows=len(rows),
        targets=int(rows.targets_per_row().sum()),
        fill=float((inputs != PADDING).mean()) if inputs.size else 0.0,
        tokens=sum(len(document) for document in documents),
        bytes=block.bytes,
        unknown=sum(int((document == tokenizer.unk_id).sum()) for document in documents),
        shown=list(_shown(rows[:shown], tokenizer)),
    )


def _shown(rows: Rows, tokenizer: AnyTokenizer) -> Iterator[ShownRow]:
    for number, targets in enumerate(rows.targets_per_row().tolist()):
        pieces, owners = rows.pieces[number], rows.documents[number]
        stretches = []
        for i, label in enumerate(rows.labels[number]):
            ids = pieces[owners == i]
            # A document of one piece in a row is its BOS if it is the last of the row, else its EOS.
            begins = ids[0] == tokenizer.bos_id and (len(ids) > 1 or i > 0)
            ends = ids[-1] == tokenizer.eos_id and (len(ids) > 1 or not begins)
            stretches.append(Stretch(label, tokenizer.decode(ids.tolist()), len(ids), bool(begins), bool(ends)))
        yield ShownRow(number, targets, int(np.count_nonzero(owners == PADDING)), stretches)
