"""The tracking process, as the run sees it: started, listened to, and ended by a deadline.

W&B is a guest of a run. None of it lives in the training process: a process of its own, in a session of its own, reads
the run folder while it grows and sends what it finds (`tracking/wandb.py`). Nothing is queued here and nothing is
handed over, so a server that is slow, gone or broken costs an update nothing, and what did not get through is still on
disk. The process gets one line with its task, one when the run has ended, and some seconds from then; after that it is
killed with all that it started. If the training process is killed, it sees its input end, marks the run as failed and
leaves within the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

import blockllm_cli
from blockllm_cli.durable import storage_errors, write_json
from blockllm_cli.errors import BlockLLMError
from blockllm_cli.recipe.sections import Tracking
from blockllm_cli.tracking.run_folder import RunFolder
from blockllm_cli.tracking.wandb_choice import LOWERING_VARIABLES, Mode, choose_mode

FOLDER, RECORD, LOG = "wandb", "run.json", "tracking.log"
FINISH_SECONDS = 8.0  # for what is left to send when a run has ended
DEFAULT_PROJECT = "blockllm"
# They would make W&B another run, at another place, than the task says.
_NOT_PASSED_ON = (*LOWERING_VARIABLES, "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR", "WANDB_SERVICE")


Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """All that the tracking process is told.

    Attributes:
        folder: the run folder.
        mode: online or offline.
        server: address to probe before an online run, or None to try without.
        goes_on: whether the run is still being written; else what is there is sent and that is all.
        id: of the W&B run.
        name: shown in W&B.
        project: in W&B.
        entity: user or team; None for the account's default.
        group: of runs in W&B, or None.
        tags: of the W&B run.
        last_seconds: how long the process may go on when the run has ended.
    """

    folder: str
    mode: Mode
    server: str | None
    goes_on: bool
    id: str
    name: str
    project: str
    entity: str | None
    group: str | None
    tags: tuple[str, ...]
    last_seconds: float

    def line(self) -> bytes:
        """The task as the one line that the process reads first."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> Task:
        """What `line` wrote."""
        values = json.loads(line)
        return cls(**{**values, "tags": tuple(values["tags"])})


def run_tracker(folder: RunFolder, name: str, tracking: Tracking, *, say: Say, warn: Say) -> Tracker:
    """The tracker of a run that begins or goes on in `folder`. One line says what is done, if anything is.

    Args:
        folder: of the run; its lock is held, and what lies past the checkpoint has been cut.
        name: `run.name`.
        tracking: the recipe's table.
        say: called with lines for the person.
        warn: called at most once, when something goes wrong.
    """
    choice = choose_mode(tracking.wandb, os.environ)
    if choice.mode == "off":
        if choice.reason:
            say(f"W&B: off, since {choice.reason}")
        return Tracker(None, folder.path)
    if choice.mode == "offline":
        since = f", since {choice.reason}" if choice.reason else ""
        say(f"W&B: offline{since}: files in {folder.path / FOLDER}{later(folder.path) if choice.reason else ''}")
    probed = choice.server if tracking.wandb == "auto" else None
    try:
        task = task_of(folder, name, tracking, mode=choice.mode, server=probed, goes_on=True)
        return Tracker.start(task, say, lambda problem: warn(f"W&B: {problem}{later(folder.path)}"))
    except (OSError, BlockLLMError) as error:
        warn(f"W&B: off, since its process cannot be started: {error}")
        return Tracker(None, folder.path)


def later(folder: Path) -> str:
    """The way out of not being in W&B now, to be put behind a reason."""
    return f"; `blockllm track {shlex.quote(str(folder))}` sends the run later"


def task_of(
    folder: RunFolder,
    name: str,
    tracking: Tracking,
    *,
    mode: Mode,
    server: str | None,
    goes_on: bool,
    last_seconds: float | None = None,
) -> Task:
    """The task for the run in `folder`.

    The id of the W&B run is the name that the run folder had when it was first tracked. It is written down beside the
    tracker's files, so that a folder that is moved, or resumed somewhere else, stays the same W&B run.

    Raises:
        StorageError: the id cannot be written.
    """
    record = folder.path / FOLDER / RECORD
    identity = _recorded_id(record)
    if identity is None:
        identity = folder.run_id
        with storage_errors(record.parent, "make"):
            record.parent.mkdir(exist_ok=True)
        write_json(record, {"id": identity})
    return Task(
        folder=str(folder.path.resolve()),
        mode=mode,
        server=server,
        goes_on=goes_on,
        id=identity,
        name=f"{name} {identity}",
        project=tracking.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
        entity=tracking.entity,
        group=tracking.group,
        tags=tracking.tags,
        last_seconds=FINISH_SECONDS if last_seconds is None else last_seconds,
    )


def _recorded_id(record: Path) -> str | None:
    try:
        identity = json.loads(record.read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return identity if isinstance(identity, str) and identity else None


class Tracker:
    """A handle on the tracking process. Nothing in it raises, and only `finish` waits.

    Attributes:
        report: what the process reported when it was done, or None.
        problem: what went wrong, in words, or None.
    """

    def __init__(
        self, process: subprocess.Popen[bytes] | None, folder: Path, say: Say = print, warn: Say = print
    ) -> None:
        self.report: Mapping[str, Any] | None = None
        self.problem: str | None = None
        self._process = process
        self._folder = folder
        self._say = say
        self._warn = warn
        self._heard = b""

    @classmethod
    def start(cls, task: Task, say: Say, warn: Say) -> Tracker:
        """Start the process for `task`.

        Args:
            task: what it is to do.
            say: called with lines for the person.
            warn: called once, when something goes wrong, with what it was.

        Raises:
            OSError: the system refuses.
        """
        folder = Path(task.folder)
        with (folder / FOLDER / LOG).open("ab") as log:
            process = subprocess.Popen(
                # -P: the folder that someone starts a run in often has a folder `wandb`.
                [sys.executable, "-P", "-m", "blockllm_cli.tracking.wandb"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for the run, which ends the process in order
            )
        tracker = cls(process, folder, say, warn)
        assert process.stdin is not None
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        tracker._tell(task.line())
        return tracker

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(FINISH_SECONDS)

    def poll(self) -> None:
        """Say what the process has to say; some microseconds where that is nothing."""
        if self._process is not None and not self._listen():
            self._end(self._process)

    def finish(self, seconds: float) -> None:
        """Tell the process that the run and its summary are complete, and wait for it, at most `seconds`."""
        process = self._process
        if process is None:
            return
        self._tell(b"ended\n")
        deadline = time.monotonic() + seconds
        try:
            while self._listen() and process.stdout is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._fail(f"not all was sent within {seconds:.0f} s")
                    break
                select.select([process.stdout], [], [], left)
        finally:
            self._end(process)

    def _tell(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has left, which `_end` reports
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _listen(self) -> bool:
        """Take what the process has written; False when it has closed its end."""
        assert self._process is not None
        assert self._process.stdout is not None
        while True:
            try:
                part = os.read(self._process.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not part:
                return False
            *lines, self._heard = (self._heard + part).split(b"\n")
            for line in lines:
                self._hear(line)

    def _hear(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            return  # not ours: something in the process printed
        if not isinstance(message, dict):
            return
        if "say" in message:
            self._say(f"W&B: {message['say']}")
        if "problem" in message:
            self._fail(message["problem"])
        self.report = message.get("report", self.report)

    def _fail(self, problem: str) -> None:
        if self.problem is None:
            self.problem = problem
            self._warn(problem)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """See to it that nothing of the process is left, and say so if it did not do all of its work."""
        self._process = None
        _end_tree(process, seconds=1.0 if self.problem is None else 0.0)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if self.report is None:
            self._fail(f"its process ended early, with {process.returncode} (see {self._folder / FOLDER / LOG})")


def _environment() -> dict[str, str]:
    """Variables of the tracking process: it finds this package wherever it is, and W&B follows the task alone."""
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    # Last: the folder may be that of all packages, and what the user puts before these must stay before them.
    places = [environment.get("PYTHONPATH", ""), str(Path(blockllm_cli.__file__).parents[1])]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    environment["WANDB_SILENT"] = "true"
    return environment


def _end_tree(process: subprocess.Popen[bytes], *, seconds: float) -> None:
    """Kill `process` and what it started, after `seconds` to leave by itself."""
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        started = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    for each in started:
        with contextlib.suppress(psutil.Error):
            each.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a disk cannot be killed at once
        process.wait(1.0)
