"""Reads ahead: a thread of the main process reads blocks of text, workers turn them into rows, in order."""

from __future__ import annotations

import queue
import threading
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial

from blockllm_cli.data.blocks import BuiltBlock, Cursor, Encoder, StreamSettings, TextBlock, build_block, read_blocks
from blockllm_cli.data.corpus import Corpus
from blockllm_cli.data.prepared import NOTHING_PREPARED, PreparedShards
from blockllm_cli.data.stopping import StopCheck
from blockllm_cli.data.workers import WorkerPool
from blockllm_cli.errors import StopRequested

_POLL_SECONDS = 0.05


class BlockSource:
    """The blocks of a corpus with their rows, one after the other, over as many epochs as are asked for.

    Memory: the text of at most `workers` + 1 blocks that wait, and the rows of one block a worker.

    Args:
        corpus: the documents.
        encoder: the tokenizer.
        settings: of the rows; epochs follow each other without end, whatever `on_exhausted` says.
        epoch: epoch of the first block.
        index: number of the first block in its epoch.
        start: where that block begins.
        prepared: shards whose ids are read in place of their text.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder,
        settings: StreamSettings,
        *,
        epoch: int,
        index: int,
        start: Cursor | None,
        prepared: PreparedShards = NOTHING_PREPARED,
    ) -> None:
        self._corpus = corpus
        self._prepared = prepared
        self._encoder = encoder
        self._settings = settings
        self._closed = threading.Event()
        self._waiting: queue.Queue[TextBlock | BaseException] = queue.Queue(settings.workers + 1)
        self._received = 0
        self._current: TextBlock | None = None
        self._failure: Exception | None = None
        self._pool: WorkerPool[TextBlock, BuiltBlock] | None = None
        if settings.workers:
            self._pool = WorkerPool(encoder, partial(build_block, settings=settings), settings.workers)
        self._reader = threading.Thread(
            target=self._read, args=(epoch, index, start), name="blockllm-reader", daemon=True
        )
        self._reader.start()

    def next_block(self, should_stop: StopCheck) -> tuple[TextBlock, BuiltBlock]:
        """The next block (with workers its texts are gone) and its rows.

        Raises:
            InputError: a file could not be read.
            BlockLLMError: a worker is gone.
            StopRequested: `should_stop` became true; the next call gives the block that this one did not.
        """
        if self._failure is not None:
            raise self._failure
        try:
            if self._current is None:
                self._current = self._next_text(should_stop)
            block = self._current
            if self._pool is None:
                built = build_block(block, self._encoder, self._settings, should_stop=should_stop)
            else:
                built = self._pool.receive(self._received, should_stop)
        except StopRequested:
            raise
        except Exception as error:
            self._failure = error
            raise
        self._received += 1
        self._current = None
        return block, built

    def _next_text(self, should_stop: StopCheck) -> TextBlock:
        while not self._closed.is_set():
            if should_stop():
                raise StopRequested
            try:
                item = self._waiting.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            return item
        raise RuntimeError("the stream of rows is closed")

    def close(self) -> None:
        """End the thread and the workers."""
        self._closed.set()
        with suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()  # a thread that waits for room goes on at once
        if self._pool is not None:
            self._pool.kill()
        self._reader.join()
        if self._pool is not None:
            self._pool.close()

    def _read(self, epoch: int, index: int, start: Cursor | None) -> None:
        """Body of the thread: read blocks, hand them to workers, and queue them for `next_block`."""
        number = 0
        try:
            while True:
                blocks = read_blocks(
                    self._corpus,
                    settings=self._settings,
                    epoch=epoch,
                    index=index,
                    start=start,
                    prepared=self._prepared,
                    should_stop=self._closed.is_set,
                )
                with closing(blocks):
                    for block in blocks:
                        if self._pool is None:
                            self._queue(block)
                        else:
                            # Queued first: who waits for this block must be able to find its worker dead.
                            self._queue(replace(block, texts=[], labels=[]))
                            self._pool.send(number, block)
                        number += 1
                epoch, index, start = epoch + 1, 0, None
        except StopRequested:
            pass
        except BaseException as error:
            with suppress(StopRequested):
                self._queue(error)

    def _queue(self, item: TextBlock | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._waiting.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return
        raise StopRequested
