"""The tracking process: makes one W&B run equal to a run folder. The only file that imports wandb.

It reads what the run writes, and follows metrics.jsonl while it grows, so a run that is watched and a run that is sent
afterwards take the same way. Nothing is remembered of what was sent, since the place that rows go to knows it:

- Online, W&B continues the run of this id and tells the first step it does not have. Rows below it are passed over.
  So after a crash the rows between the checkpoint and the crash, which the resumed run makes again, bit for bit the
  same, are not sent twice; and a run that was offline, or behind, when it was cut is caught up with.
- Offline, every process writes all rows from the first to a folder of its own, and removes what earlier processes of
  this run left there. There is one folder with each step once, whatever was killed in between, and `wandb sync` takes
  it as it is. (W&B cannot go on with an offline run; two halves under one id would be left to the upload.)

A row keeps our `step` and `train/tokens` as values, and our step is W&B's as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockllm_cli.tracking.run_folder import EVENTS, METRICS, PLAN, RECIPE, SUMMARY
from blockllm_cli.tracking.wandb_choice import Mode, server_problem
from blockllm_cli.tracking.wandb_feed import RowFeed
from blockllm_cli.tracking.wandb_process import FOLDER, Task, later

if TYPE_CHECKING:
    import wandb

POLL_SECONDS = 1.0
INIT_SECONDS = 60.0
_STEP, _TOKENS, _PERPLEXITY = "step", "train/tokens", "eval/perplexity"
# Quiet, and nothing sampled or collected beside what the run folder has.
_SETTINGS = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
    "init_timeout": INIT_SECONDS,
}

Tell = Callable[[Mapping[str, Any]], None]


class _UnreachableError(Exception):
    """The server cannot be reached, and an offline run is not wanted instead."""


class Mirror:
    """One W&B run that follows one run folder.

    Args:
        task: what to do.
        tell: sends a message to the run.
    """

    def __init__(self, task: Task, tell: Tell) -> None:
        self._task = task
        self._tell = tell
        self._folder = Path(task.folder)
        self._rows = RowFeed(self._folder / METRICS)
        self._has_failed = False
        self._rows_failed = False
        self.sent = 0
        self.mode = self._reachable_mode()
        self._former = self._offline_folders()
        self._run = self._begin()
        self._next = self._run.starting_step  # of a run that W&B has; else 0
        if self.mode == "online":
            tell({"say": str(self._run.url)})

    @property
    def report(self) -> dict[str, Any]:
        """What was done, for whoever started the process."""
        url = str(self._run.url) if self.mode == "online" else None
        return {"mode": self.mode, "rows": self.sent, "url": url, "files": str(Path(self._run.dir).parent)}

    def _reachable_mode(self) -> Mode:
        """The task's mode, or offline where the server does not answer."""
        task = self._task
        problem = server_problem(task.server) if task.mode == "online" and task.server else None
        if problem is None:
            return task.mode
        if not task.goes_on:
            raise _UnreachableError(f"cannot reach {task.server}: {problem}")
        self._tell(
            {
                "say": f"offline, since {task.server} cannot be reached ({problem}): files in {self._folder / FOLDER}"
                + later(self._folder)
            }
        )
        return "offline"

    def _begin(self) -> wandb.Run:
        import wandb

        task = self._task
        known = wandb.Settings.model_fields
        run = wandb.init(
            mode="online" if self.mode == "online" else "offline",
            dir=task.folder,
            id=task.id,
            resume="allow",
            name=task.name,
            project=task.project,
            entity=task.entity,
            group=task.group,
            tags=task.tags,
            config=tomllib.loads((self._folder / RECIPE).read_text(encoding="utf-8")),
            settings=wandb.Settings(**{name: value for name, value in _SETTINGS.items() if name in known}),
        )
        run.define_metric(_TOKENS)
        run.define_metric("*", step_metric=_TOKENS)
        run.define_metric(_PERPLEXITY, step_metric=_TOKENS, summary="min")
        return run

    def follow(self, has_ended: threading.Event) -> None:
        """Send rows as they appear until the run has ended, then everything that belongs to its end."""
        is_last = False
        while not is_last:
            is_last = has_ended.is_set()  # before the rows are read: none comes after
            if not self._rows_failed:
                self._rows_failed = not self._attempt("no more rows are sent", self._send_new)
            if not self._rows_failed:
                self._remove_former()
            if not is_last:
                has_ended.wait(POLL_SECONDS)
        self._close()

    def _send_new(self) -> None:
        for row in self._rows.new():
            step = row[_STEP]
            if step < self._next:
                continue
            self._run.log(row, step=step, commit=True)
            self._next = step + 1
            self.sent += 1

    def _close(self) -> None:
        summary = _json(self._folder / SUMMARY)
        code = summary.get("exit_code", 1)  # a run without a summary was killed
        if not self._rows_failed:
            self._attempt("the summary is not sent", lambda: self._run.summary.update(summary))
            if summary.get("status") == "completed":
                self._attempt("the selections are not sent", lambda: self._send_selections(summary["steps"]))
        if self._task.goes_on and summary.get("status") == "diverged":
            title, text = f"{self._task.name} diverged", summary["message"]
            self._attempt("no alert is sent", lambda: self._run.alert(title=title, text=text, level="ERROR"))
        self._attempt("the end of the run is not sent", lambda: self._run.finish(exit_code=code))

    def _send_selections(self, steps: int) -> None:
        """Table and picture of the selections, for methods that make any.

        They take the step after the last, so they are for complete runs: in another one a row may follow there.
        """
        import wandb

        from blockllm_cli.tracking.selection_chart import COLUMNS, chart, table_rows
        from blockllm_cli.tracking.selections import parameters_in, read_selections, table_of

        selections = read_selections(self._folder / EVENTS)
        if not selections or self._next > steps + 1:  # none were made, or W&B has them
            return
        table = table_of(selections, last=steps, parameters=parameters_in(self._folder / PLAN))
        media = {
            "selections/blocks": wandb.Table(columns=list(COLUMNS), data=table_rows(table)),
            "selections/map": wandb.Html(chart(table), inject=False),
        }
        self._run.log(media, step=steps + 1, commit=True)

    def _offline_folders(self) -> list[Path]:
        return list((self._folder / FOLDER).glob(f"offline-run-*-{self._task.id}"))

    def _remove_former(self) -> None:
        """Remove the offline folders of earlier processes, once all their rows are in this one's run."""
        for former in self._former:
            if former != Path(self._run.dir).parent:  # W&B names them by the second
                shutil.rmtree(former, ignore_errors=True)
        self._former.clear()

    def _attempt(self, consequence: str, action: Callable[[], Any]) -> bool:
        """Whether `action` worked. Any error of W&B is no business of the run: the first is said."""
        try:
            action()
        except Exception as error:
            if not self._has_failed:
                self._has_failed = True
                self._tell({"problem": f"{consequence}: {_words(error)}"})
            return False
        return True


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _words(error: BaseException) -> str:
    """The first line of an error, with its class where it says little."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def carry_out(task: Task, has_ended: threading.Event, tell: Tell) -> None:
    """Do `task`, and report."""
    with (Path(task.folder) / FOLDER / ".lock").open("a") as lock:
        with contextlib.suppress(OSError):  # not every network file system has locks
            fcntl.flock(lock, fcntl.LOCK_EX)  # a process that a killed run left behind may still be at its end
        try:
            mirror = Mirror(task, tell)
        except _UnreachableError as error:
            tell({"problem": str(error)})
            return
        except Exception as error:
            tell({"problem": f"not tracked: {_words(error)}"})
            return
        mirror.follow(has_ended)
        tell({"report": mirror.report})


def main() -> None:
    """Take the task from the first line of stdin, do it, leave.

    The process ends by force in any case: whatever W&B registered to be done at exit has had its time.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what W&B sends itself when someone presses stop in the browser
    with contextlib.suppress(OSError):
        os.nice(5)  # the training comes first
    channel = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what anything prints goes to the log

    def tell(message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):
            os.write(channel, json.dumps(message).encode() + b"\n")

    task = Task.of_line(sys.stdin.buffer.readline())
    has_ended = threading.Event()
    threading.Thread(target=_watch, args=(task.last_seconds, has_ended), daemon=True).start()
    carry_out(task, has_ended, tell)
    os._exit(0)


def _watch(last_seconds: float, has_ended: threading.Event) -> None:
    """Learn from stdin that the run has ended; if it was killed, leave in time."""
    if sys.stdin.buffer.readline():
        has_ended.set()
        sys.stdin.buffer.readline()  # ends when the run no longer waits
    has_ended.set()
    threading.Event().wait(last_seconds)
    os._exit(1)


if __name__ == "__main__":
    main()
