"""`blockllm export`: a run's model as a folder that transformers loads, whole and checked before it is there."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockllm_cli.durable import storage_errors, sync_folder
from blockllm_cli.errors import InterruptedRunError, RecipeError, StopRequested
from blockllm_cli.methods.base import Method
from blockllm_cli.model.hf_config import CONFIG_FILE
from blockllm_cli.runner.export_card import Card
from blockllm_cli.runner.export_check import Comparison, compare
from blockllm_cli.runner.export_files import (
    SHARD_BYTES,
    TextMarks,
    write_configs,
    write_page,
    write_tokenizer,
    write_weights,
)
from blockllm_cli.runner.finished import OpenedRun, opened_run
from blockllm_cli.runner.machine import choose_precision
from blockllm_cli.tracking.run_folder import RECIPE
from blockllm_cli.tracking.terminal import Terminal
from blockllm_cli.training.signals import StopFlag

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CARD = "README.md"
# What an export may have written; all else is somebody's.
_EXPORTED = re.compile(
    r"README\.md|(generation_)?config\.json|tokenizer(\.json|_config\.json|\.model)|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)


@dataclass(frozen=True)
class ExportRequest:
    """What the command line asks for.

    Attributes:
        run: folder of a run.
        to: folder to make.
        step: which checkpoint; None for the newest.
        dtype: of the stored weights, a key of `DTYPES`; None: that of the run's weights.
        overwrite: whether a model that is there already may be replaced.
        shard_bytes: most bytes in one file of weights.
    """

    run: Path
    to: Path
    step: int | None = None
    dtype: str | None = None
    overwrite: bool = False
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class Exported:
    """What came of it.

    Attributes:
        folder: the export.
        run: folder of the run.
        step: update whose weights they are.
        dtype: of the stored weights.
        parameters: elements of all parameters.
        files: name -> bytes.
        comparison: with the run.
        tokenizer_problem: why there is no tokenizer.json, if there is none.
    """

    folder: Path
    run: Path
    step: int
    dtype: str
    parameters: int
    files: dict[str, int]
    comparison: Comparison
    tokenizer_problem: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "folder": str(self.folder),
            "run": str(self.run),
            "step": self.step,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "files": self.files,
            "comparison": self.comparison.to_json(),
            "tokenizer_problem": self.tokenizer_problem,
        }


def export_run(request: ExportRequest, terminal: Terminal) -> Exported:
    """Write the model of a run to `request.to`: all of it, compared with the run, or nothing.

    Raises:
        RecipeError: the folder is not empty.
        InputError: there is no such run or checkpoint, or it is damaged.
        GuardError: what was written does not compute what the run computes; it is removed.
        StorageError: the disk refuses.
        InterruptedRunError: a signal stopped it.
    """
    to = request.to.expanduser().resolve()  # a link stays one: what it leads to is the folder
    _check_target(to, request)
    with StopFlag(terminal) as stop, opened_run(request.run, step=request.step) as run:
        try:
            with _beside(to) as folder:
                return _write(request, run, folder, to, terminal, stop)
        except StopRequested as error:
            assert stop.signal_number is not None
            raise InterruptedRunError("stopped; nothing was written", stop.signal_number) from error


def _check_target(to: Path, request: ExportRequest) -> None:
    """Refuse to write over something, but for an earlier export that the user gives up.

    Raises:
        RecipeError: with the way out.
    """
    if not to.exists():
        return
    if not to.is_dir():
        raise RecipeError(f"--to {request.to}: there is a file of this name; name a folder")
    inside = list(to.iterdir())
    if not inside:
        return
    if not request.overwrite:
        raise RecipeError(f"--to {request.to}: the folder is not empty; name another, or replace it with --overwrite")
    foreign = [path.name for path in inside if not path.is_file() or _EXPORTED.fullmatch(path.name) is None]
    if foreign or not (to / CONFIG_FILE).is_file():
        what = f" ({sorted(foreign)[0]})" if foreign else ""
        raise RecipeError(
            f"--to {request.to}: --overwrite replaces an exported model, and this folder holds something else{what}; "
            "name another"
        )


@contextlib.contextmanager
def _beside(to: Path) -> Iterator[Path]:
    """A hidden folder beside `to` that takes its place when the block has ended well, and is removed otherwise."""
    beside, old = to.with_name(f".{to.name}.tmp"), to.with_name(f".{to.name}.old.tmp")
    with storage_errors(to, "write", option="--to"):
        for rest in (beside, old):
            shutil.rmtree(rest, ignore_errors=True)
        beside.mkdir(parents=True)
    try:
        yield beside
        with storage_errors(to, "write", option="--to"):
            sync_folder(beside)
            if to.exists():
                to.rename(old)
            try:
                beside.rename(to)
            except OSError:
                if old.exists():
                    old.rename(to)
                raise
            sync_folder(to.parent)
    finally:
        for rest in (beside, old):
            shutil.rmtree(rest, ignore_errors=True)


def _write(
    request: ExportRequest, run: OpenedRun, folder: Path, to: Path, terminal: Terminal, should_stop: Callable[[], bool]
) -> Exported:
    recipe, step = run.resolved.recipe, run.checkpoint.step
    dtype = request.dtype or next(word for word, each in DTYPES.items() if each == run.model.head_weight.dtype)
    positions = recipe.data.sequence_length
    marks = TextMarks.of(run.tokenizer, recipe.data.layout)
    config = run.model.config
    weights = plain_weights(run)
    card = Card(
        run.resolved,
        (run.folder.path / RECIPE).read_text(encoding="utf-8"),
        config,
        step,
        dtype,
        run.folder.summary(),
        marks.opening is not None,
    )
    total = sum(weight.numel() * DTYPES[dtype].itemsize for weight in weights.values())
    with (
        storage_errors(to, "write", option="--to"),
        terminal.progress(f"writing the weights of update {step} in {dtype}", total=total, unit="bytes") as progress,
    ):
        write_weights(
            folder, weights, DTYPES[dtype], should_stop, shard_bytes=request.shard_bytes, wrote=progress.advance
        )
        write_configs(folder, config, DTYPES[dtype], positions, marks)
        problem = write_tokenizer(folder, run.tokenizer, positions, marks)
        write_page(folder / CARD, card.text())
    if should_stop():
        raise StopRequested
    with terminal.progress("comparing what was written with the run"):
        comparison = compare(folder, weights, DTYPES[dtype], run.tokenizer, config)
    if should_stop():
        raise StopRequested
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Exported(to, run.folder.path, step, dtype, config.num_parameters, files, comparison, problem)


def plain_weights(run: OpenedRun) -> dict[str, Tensor]:
    """The weights of the run's model without what its method added, merged once.

    A method that adds nothing is not made: its state would cost memory for nothing.
    """
    recipe = run.resolved.recipe
    method = run.resolved.method(choose_precision(recipe.run.precision, recipe.run.rounding, run.device)[0])
    if type(method).merged_weights is not Method.merged_weights:
        method.prepare(run.model)
        method.load_state_dict(run.checkpoint.method())
    return method.merged_weights(run.model)
