"""Runs of a tiny Llama, in this process or by the installed command: the setup that most tests of whole runs share."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

RECIPE = """
[run]
name = "tiny"
output = "{output}"
device = "cpu"
precision = "fp32"
threads = 1

[model]
hidden_size = 32
intermediate_size = 88
num_hidden_layers = 2
num_attention_heads = 4
vocab_size = 320

[tokenizer]
source = "file"
path = "{tokenizer}"

[data]
corpus = "files"
train = "{corpus}/train-*.jsonl"
validation = "{corpus}/validation.jsonl"
sequence_length = 32
layout = "pack"
block_documents = 64
workers = 0

[batch]
rows = 8

[schedule]
steps = 20
warmup = 4
learning_rate = 3e-3

[method]
name = "adamw"

[evaluate]
every = 10
tokens = 600
rows = 8

[checkpoint]
every = 0
keep = 3

[tracking]
log_every = 1
log_rows = true
"""


@dataclass
class Result:
    """A run folder, read back."""

    folder: Path
    output: str

    @property
    def metrics(self) -> list[dict]:
        return read_rows(self.folder / "metrics.jsonl")

    @property
    def events(self) -> list[dict]:
        return read_rows(self.folder / "events.jsonl")

    @property
    def rows(self) -> list[dict]:
        return read_rows(self.folder / "rows.jsonl")

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))

    def column(self, key: str) -> list:
        return [row[key] for row in self.metrics if key in row]

    def tensors(self, file: str = "weights") -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        newest = (self.folder / "checkpoints" / "latest").read_text().strip()
        return load_file(self.folder / "checkpoints" / newest / f"{file}.safetensors")


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@dataclass
class TinyRuns:
    """Makes tiny runs under one folder.

    Attributes:
        folder: runs and recipe live here.
        corpus: folder with train-*.jsonl and validation.jsonl.
        tokenizer: a model of 300 pieces trained on it.
    """

    folder: Path
    corpus: Path
    tokenizer: Path
    recipe: Path = field(init=False)

    def __post_init__(self) -> None:
        self.recipe = self.folder / "tiny.toml"
        text = RECIPE.format(output=self.folder / "runs", tokenizer=self.tokenizer, corpus=self.corpus)
        self.recipe.write_text(text, encoding="utf-8")

    def run(self, *overrides: str, method: str | None = None, resume=None, stop_after=None) -> Result:
        """Pretrain in this process; `overrides` are `table.key=value`."""
        from blockllm_cli.runner.pretrain import PretrainRequest, pretrain
        from blockllm_cli.tracking.terminal import Terminal

        printed = io.StringIO()
        request = PretrainRequest(
            str(self.recipe), list(overrides), method, None if resume is None else str(resume), stop_after
        )
        console = Console(file=printed, width=200, highlight=False)
        with Terminal(console, warnings=console) as terminal:
            folder = pretrain(request, terminal)
        return Result(folder, printed.getvalue())

    def command(self, *arguments: str) -> list[str]:
        """The installed command, with the recipe in its place."""
        return [str(Path(sys.executable).with_name("blockllm")), "pretrain", str(self.recipe), *arguments]

    def call(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """Pretrain by the installed command in a process of its own."""
        options.setdefault("env", {**os.environ, "OMP_NUM_THREADS": "1"})
        options.setdefault("timeout", 300)
        return subprocess.run(self.command(*arguments), capture_output=True, text=True, check=False, **options)

    def newest(self) -> Result:
        """The newest run under the folder."""
        return Result(max((self.folder / "runs" / "tiny").iterdir()), "")


def equal_rows(one: list[dict], other: list[dict]) -> None:
    """Assert that two lists of metrics agree in every key that does not speak of the machine."""
    from blockllm_cli.metrics import is_about_the_machine

    def bare(rows: list[dict]) -> list[dict]:
        return [{key: value for key, value in row.items() if not is_about_the_machine(key)} for row in rows]

    assert bare(one) == bare(other)


def equal_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Assert that two dictionaries of tensors are equal to the bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different
