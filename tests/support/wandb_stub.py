"""A stand-in for the package wandb that fails where it is told to: for the tracking process, through PYTHONPATH."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SOURCE = """
import os, signal, time

def _do(name):
    with open(os.environ["STUB_CALLS"], "a") as calls:
        calls.write(f"{os.getpid()} {name}\\n")
    how, _, where = os.environ["STUB"].partition(":")
    if where != name:
        return
    if how == "raise":
        raise RuntimeError(f"{name} is broken")
    if how == "hang":
        time.sleep(1e6)
    if how == "die":
        os.kill(os.getpid(), signal.SIGSEGV)

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

    def names(self) -> list[str]:
        return [line.split()[1] for line in self.calls.read_text(encoding="utf-8").splitlines()]

    def pids(self) -> set[int]:
        return {int(line.split()[0]) for line in self.calls.read_text(encoding="utf-8").splitlines()}
