"""The folder of one run: its name, its lock, its files.

runs/<name>/<run id>/
    recipe.toml  environment.json  plan.json  metrics.jsonl  events.jsonl  [rows.jsonl]  log.txt  summary.json
    tokenizer.model  checkpoints/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shlex
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from blockllm_cli.durable import storage_errors, sync_folder, write_json, write_text
from blockllm_cli.errors import InputError, StorageError
from blockllm_cli.tracking.log import RunLog

RECIPE, ENVIRONMENT, PLAN, SUMMARY, TOKENIZER = (
    "recipe.toml",
    "environment.json",
    "plan.json",
    "summary.json",
    "tokenizer.model",
)
METRICS, EVENTS, ROWS, LOG = "metrics.jsonl", "events.jsonl", "rows.jsonl", "log.txt"


class JsonLines:
    """An append-only file of JSON objects, one a line, each with its `step`.

    Args:
        path: the file; made if missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(path, "open"):
            self._file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line and hand it to the operating system."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        with storage_errors(self.path, "write"):
            self._file.write(line + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Make what was appended survive a power cut."""
        with storage_errors(self.path, "write"):
            os.fsync(self._file.fileno())

    def cut(self, last_step: int) -> None:
        """Remove the rows past `last_step`."""
        self._file.close()
        cut_json_lines(self.path, last_step)
        with storage_errors(self.path, "open"):
            self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file; a failing disk has been reported by then."""
        with contextlib.suppress(OSError):
            self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that a killed process left half-written is passed over."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number >= len(lines) - 1:
                break
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
    return rows


def cut_json_lines(path: Path, last_step: int) -> None:
    """Remove rows past `last_step`, whole or not at all."""
    if not path.exists():
        return
    rows = read_json_lines(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise InputError(f"{path}, row {number}: not an object with a whole number under `step`")
    kept = [row for row in rows if row["step"] <= last_step]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


class RunFolder:
    """One run on disk.

    Attributes:
        path: the folder.
        name: name of the run, made safe for a file name.
        run_id: name of the folder itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def run_id(self) -> str:
        """Unique among the runs of one name."""
        return self.path.name

    @property
    def resume_command(self) -> str:
        """What to type to go on with the run, as a shell takes it."""
        return f"blockllm pretrain --resume {shlex.quote(str(self.path))}"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @classmethod
    def create(cls, output: Path, name: str) -> RunFolder:
        """A new, empty run folder under `output`.

        Raises:
            StorageError: it cannot be made.
        """
        # To the millisecond, so that names sort as runs began.
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
        path = output / safe_name(name) / f"{stamp}-{secrets.token_hex(2)}"
        with storage_errors(path, "make"):
            path.mkdir(parents=True)
            sync_folder(path.parent)
        return cls(path)

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The run folder at `path`.

        Raises:
            InputError: there is none.
        """
        if not path.is_dir():
            raise InputError(f"{path} is not a folder; name the folder of a run, such as runs/NAME/RUN")
        if not (path / RECIPE).is_file():
            raise InputError(f"{path} has no {RECIPE}, so it is not the folder of a run")
        return cls(path)

    @classmethod
    def latest(cls, output: Path, name: str) -> RunFolder:
        """The newest run named `name` under `output`.

        Raises:
            InputError: there is none.
        """
        parent = output / safe_name(name)
        runs = sorted(path.parent for path in parent.glob(f"*/{RECIPE}"))
        if not runs:
            raise InputError(f"there is no run to resume under {parent}; leave out --resume to start one")
        return cls(runs[-1])

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of this folder for the duration of the block.

        Raises:
            StorageError: another process is in it.
        """
        with storage_errors(self.path, "open"):
            descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StorageError(f"{self.path} is in use by another process; wait for it or stop it") from error
            yield
        finally:
            os.close(descriptor)

    def summary(self) -> dict[str, Any] | None:
        """What summary.json says, or None where it says nothing: nothing in a run depends on it."""
        try:
            value = json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) and {"status", "steps", "perplexity"} <= value.keys() else None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace summary.json."""
        write_json(self.path / SUMMARY, summary)

    def cut(self, last_step: int, *, row_pending: bool) -> None:
        """Remove what was logged past `last_step` and the summary, before the run goes on from there.

        With `row_pending` the row of `last_step` itself was not complete at the checkpoint and is written anew.
        """
        cut_json_lines(self.path / METRICS, last_step - row_pending)
        for name in (EVENTS, ROWS):
            cut_json_lines(self.path / name, last_step)
        with storage_errors(self.path, "change"):
            (self.path / SUMMARY).unlink(missing_ok=True)

    def open_log(self) -> RunLog:
        """log.txt, for appending."""
        return RunLog(self.path / LOG)


def safe_name(name: str) -> str:
    """`name` as a name for a folder on any system: other characters than letters, digits, `._-` become `-`."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip(".-") or "run"
