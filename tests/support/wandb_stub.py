"""A stand-in for the package wandb that fails where it is told to: for the tracking process, through PYTHONPATH."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

SOURCE = """
import json, os, signal, subprocess, sys, time

def _do(name):
    with open(os.environ["STUB_CALLS"], "a") as calls:
        calls.write(f"{os.getpid()} {name}\\n")
    how, _, where = os.environ["STUB"].partition(":")
    if where != name:
        return
    if how == "spawn":  # what W&B does with its own helper process, which may not end with it
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"], start_new_session=True)
        with open(os.environ["STUB_CALLS"], "a") as calls:
            calls.write(f"{child.pid} child\\n")
        time.sleep(1e6)
    if how == "raise":
        raise RuntimeError(f"{name} is broken")
    if how == "hang":
        time.sleep(1e6)
    if how == "die":
        os.kill(os.getpid(), signal.SIGSEGV)

with open(os.environ["STUB_CALLS"] + ".facts", "w") as facts:
    ids = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    json.dump({"session": os.getsid(0), "safe_path": sys.flags.safe_path, "variables": ids}, facts)
_do("import")

class Settings:
    model_fields = {}

class Summary:
    def update(self, values):
        _do("summary")

class Run:
    starting_step, url, dir, summary = 0, "http://stub", "/nowhere/files", Summary()
    def define_metric(self, *_, **__):
        _do("define_metric")
    def log(self, row, step, commit):
        _do("log")
    def alert(self, **_):
        _do("alert")
    def finish(self, exit_code):
        _do("finish")

def init(**_):
    _do("init")
    return Run()
"""


class Stub:
    """The stand-in, installed for the processes that this test starts.

    Attributes:
        calls: file with `pid name` of each call.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str) -> None:
        (folder / "stub").mkdir()
        (folder / "stub" / "wandb.py").write_text(SOURCE, encoding="utf-8")
        self.calls = folder / "calls"
        self.calls.touch()
        monkeypatch.setenv("PYTHONPATH", str(folder / "stub"), prepend=os.pathsep)
        monkeypatch.setenv("STUB_CALLS", str(self.calls))
        monkeypatch.setenv("STUB", behaviour)
        monkeypatch.delenv("WANDB_MODE", raising=False)

    def facts(self) -> dict[str, Any]:
        """How the process was started: its session, whether its own folder is searched, variables of W&B."""
        found: dict[str, Any] = json.loads(self.calls.with_name("calls.facts").read_text(encoding="utf-8"))
        return found

    def names(self) -> list[str]:
        return [line.split()[1] for line in self.calls.read_text(encoding="utf-8").splitlines()]

    def pids(self) -> set[int]:
        return {int(line.split()[0]) for line in self.calls.read_text(encoding="utf-8").splitlines()}
