"""Processes that tokenise, started by spawn, that cannot outlive the run nor be stopped by its signals.

Each worker is fed and answers through one pipe, items are dealt round-robin and answers fetched in the same order, so
the number of workers never shows in what comes of them. The pipe is also the lifeline: when the main process is gone,
however it ended, the worker reads the end of its pipe and leaves. SIGINT and SIGTERM, which reach a whole process
group, are blocked in workers from their first instruction on: only the main process decides what a signal means.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

from blockllm_cli.data.blocks import Encoder
from blockllm_cli.data.stopping import StopCheck
from blockllm_cli.errors import BlockLLMError, StopRequested

_POLL_SECONDS = 0.05

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class WorkerPool(Generic[Item, Answer]):
    """Processes that make answers of items.

    `send` may be called by another thread than `receive`. Item k goes to worker k modulo their number; `receive` must
    be called for k = 0, 1, 2, ... in turn.

    Args:
        encoder: the tokenizer; each worker makes its own from the class and `model_bytes`.
        work: what a worker does with an item and its tokenizer; it is pickled.
        count: number of processes, at least 1.
        remedy: what to do where a worker was killed for want of memory.
    """

    def __init__(
        self,
        encoder: Encoder,
        work: Callable[[Item, Encoder], Answer],
        count: int,
        *,
        remedy: str = "lower data.workers or data.block_documents; data.workers = 0 tokenises in the main process",
    ) -> None:
        self._remedy = remedy
        context = multiprocessing.get_context("spawn")
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection] = []
        atexit.register(self.kill)  # runs before multiprocessing waits for its children at exit
        resource_tracker.ensure_running()  # where it starts on demand, it ends by unblocking signals
        try:
            with _signals_blocked():
                for i in range(count):
                    ours, theirs = context.Pipe()
                    process = context.Process(
                        target=_serve,
                        args=(theirs, type(encoder), encoder.model_bytes, work),
                        name=f"blockllm-data-{i}",
                        daemon=True,
                    )
                    self._connections.append(ours)
                    process.start()
                    self._processes.append(process)
                    theirs.close()
        except BaseException:
            self.kill()
            self.close()
            raise

    def send(self, number: int, item: Item) -> None:
        """Hand item `number` to its worker; waits while that worker is busy.

        Raises:
            BlockLLMError: the worker is gone.
        """
        try:
            self._connections[number % len(self._connections)].send(item)
        except OSError as error:
            raise self._death(number) from error

    def receive(self, number: int, should_stop: StopCheck) -> Answer:
        """What became of item `number`.

        Raises:
            BlockLLMError: the worker is gone.
            RuntimeError: the work failed; the text is the worker's traceback.
            StopRequested: `should_stop` became true; the call can be repeated.
        """
        connection = self._connections[number % len(self._connections)]
        while not connection.poll(_POLL_SECONDS):
            if should_stop():
                raise StopRequested
        try:
            answer, failure = connection.recv()
        except (EOFError, OSError) as error:
            raise self._death(number) from error
        if failure is not None:
            raise RuntimeError(f"a data worker failed:\n{failure}")
        made: Answer = answer
        return made

    def kill(self) -> None:
        """End all workers at once, wait for them, and thereby free a thread that waits in `send`."""
        atexit.unregister(self.kill)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def close(self) -> None:
        """Close the pipes, after `kill`, once nobody uses them."""
        for process in self._processes:
            process.close()
        for connection in self._connections:
            connection.close()
        self._processes.clear()
        self._connections.clear()

    def _death(self, number: int) -> BlockLLMError:
        process = self._processes[number % len(self._processes)]
        process.join(1.0)
        return BlockLLMError(
            f"the data worker with process id {process.pid} ended (exit code {process.exitcode}) while it was needed. "
            f"If the system killed it for memory (-9), {self._remedy}"
        )


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM in this thread; a process started meanwhile has them blocked for good."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(
    connection: Connection,
    encoder_class: Callable[[bytes], Encoder],
    model_bytes: bytes,
    work: Callable[[Any, Encoder], Any],
) -> None:
    """Body of a worker: answer each item with what becomes of it and None, or None and a traceback."""
    with contextlib.suppress(EOFError, OSError):  # the main process has closed the pipe or is gone
        try:
            encoder = encoder_class(model_bytes)
        except Exception:
            connection.recv()
            connection.send((None, traceback.format_exc()))
            return
        while True:
            item = connection.recv()
            answer, failure = None, None
            try:
                answer = work(item, encoder)
            except Exception:
                failure = traceback.format_exc()
            connection.send((answer, failure))
