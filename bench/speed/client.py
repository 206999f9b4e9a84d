"""The driver's end of a worker: a process that lives for a case and makes a repeat when asked."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speed.cases import OURS

BENCH = Path(__file__).parents[1]
PATIENCE = 900.0
"""Seconds that one answer may take; compiling takes the longest."""


class PeerAbsentError(Exception):
    """The environment of a peer is not there."""


class WorkerFailedError(Exception):
    """A worker ended, or answered nothing sensible; the message has the end of what it said."""


def python_of(peer: str, environments: Path) -> Path:
    """The interpreter of a peer's environment.

    Raises:
        PeerAbsentError: it has not been made.
    """
    if peer == OURS:
        return Path(sys.executable)
    python = environments / peer / "bin" / "python"
    if not ((environments / peer / ".ready").exists() and python.exists()):  # it links to what may be gone
        raise PeerAbsentError(f"{environments / peer} is not there: make bench-setup")
    return python


class Worker:
    """One worker process.

    Args:
        command: what to run.
        spec: its first line.
        threads: of torch and of what lies below it.
        cache: folder of what torch compiles.
    """

    def __init__(self, command: Sequence[str], spec: Mapping[str, Any], threads: int, cache: Path) -> None:
        # OMP_NUM_THREADS is read when torch is loaded, so every process is told alike, before that.
        inherited = os.environ.get("PYTHONPATH") if command[0] == sys.executable else None  # none into a peer's
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(BENCH), inherited])),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCHINDUCTOR_CACHE_DIR": str(cache),  # what is compiled once need not be again in the next sitting
        }
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # read after a failure, closed by `close`
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
            cwd=BENCH.parent,
            text=True,
            start_new_session=True,  # so that it ends with all that it has started
        )
        self._send(spec)

    def ready(self) -> dict[str, Any]:
        """Wait until repeats can be asked for; what the worker says of itself.

        Raises:
            WorkerFailedError: it ended before.
        """
        facts: dict[str, Any] = self._answer()["ready"]
        return facts

    def repeat(self) -> dict[str, Any]:
        """One repeat.

        Raises:
            WorkerFailedError: the worker ended.
        """
        self._send({"go": True})
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._said.close()

    def kill(self) -> None:
        """End the process and what it has started, whatever they do; who waits for an answer is told."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left of them
            os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure() from error

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        alarm = threading.Timer(PATIENCE, self.kill)
        alarm.start()
        try:
            line = self._process.stdout.readline()
        finally:
            alarm.cancel()
        if not line:
            raise self._failure()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:  # its end, maybe in the middle of a line
            self.kill()
            raise self._failure() from error
        return answer

    def _failure(self) -> WorkerFailedError:
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return WorkerFailedError(f"ended with {code}: {' | '.join(lines[-3:])}")
