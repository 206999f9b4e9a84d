"""Checkpoints: one folder per save, all of it or nothing of it.

    checkpoints/step-00000500/
        weights.safetensors    the model, Hugging Face names
        method.safetensors     tensors of the method's state, keyed by parameter name
        state.json             everything else, plain values
        manifest.json          size and SHA-256 of each file above
    checkpoints/latest         name of the newest folder

A folder is written under a hidden name, synced, and renamed; `latest` is replaced after that. Whatever kills the
process leaves either the old checkpoints or the new one. All tensors are loaded by safetensors, all the rest as JSON:
nothing in a checkpoint can run code.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockllm_cli.durable import file_sha256, read_json, storage_errors, sweep, sync_folder, write_json, write_text
from blockllm_cli.errors import DivergedError, InputError
from blockllm_cli.model.weights import StoredTensors, save_tensors

FORMAT = 1
WEIGHTS, METHOD, STATE, MANIFEST, LATEST = (
    "weights.safetensors",
    "method.safetensors",
    "state.json",
    "manifest.json",
    "latest",
)
_FOLDER = re.compile(r"^step-(\d{8,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest was found to be true.

    Attributes:
        folder: where it is.
        step: updates done when it was written.
        state: the plain values.
    """

    folder: Path
    step: int
    state: dict[str, Any]

    def weights(self) -> Mapping[str, Tensor]:
        """The model's tensors on the CPU, read one by one as they are asked for."""
        return StoredTensors(self.folder / WEIGHTS)

    def method(self) -> Mapping[str, Any]:
        """The method's state: plain values beside its tensors, which are read one by one as they are asked for."""
        return MethodState(self.state["method"], StoredTensors(self.folder / METHOD))


class MethodState(Mapping[str, Any]):
    """Plain values and stored tensors of a method as one mapping, without holding the tensors."""

    def __init__(self, plain: Mapping[str, Any], tensors: StoredTensors) -> None:
        self._plain = plain
        self._tensors = tensors

    def __getitem__(self, name: str) -> Any:
        return self._plain[name] if name in self._plain else self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self._tensors

    def __len__(self) -> int:
        return len(self._plain) + len(self._tensors)


def save_checkpoint(
    checkpoints: Path,
    *,
    step: int,
    weights: Mapping[str, Tensor],
    method_state: Mapping[str, Any],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint and remove the oldest beyond `keep`.

    Args:
        checkpoints: folder that holds all of a run; made if missing.
        step: updates done.
        weights: parameter name -> tensor, on any device.
        method_state: the method's `state_dict()`: tensors and plain values.
        state: plain values of the run.
        keep: how many to leave.

    Returns:
        The new folder. A sound checkpoint of this step that exists already is left as it is.

    Raises:
        DivergedError: a weight is not finite; nothing is written and the older checkpoints stay.
        StorageError: the disk refuses; the older checkpoints stay.
    """
    folder = checkpoints / f"step-{step:08d}"
    if folder.exists():
        if _is_sound(folder):
            return folder
        set_aside(checkpoints, [folder])
    _check_finite(weights, step)
    beside = checkpoints / f".{folder.name}.{os.getpid()}.tmp"
    tensors = {name: value for name, value in method_state.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in method_state.items() if not isinstance(value, Tensor)}
    with storage_errors(folder, "write the checkpoint"):
        sweep(checkpoints)
        beside.mkdir(parents=True)
        try:
            save_tensors(weights, beside / WEIGHTS)
            save_tensors(tensors, beside / METHOD)
            write_json(beside / STATE, {**state, "step": step, "method": plain})
            files = {
                name: {"bytes": (beside / name).stat().st_size, "sha256": file_sha256(beside / name)}
                for name in (WEIGHTS, METHOD, STATE)
            }
            write_json(beside / MANIFEST, {"format": FORMAT, "step": step, "files": files})
            beside.rename(folder)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        sync_folder(checkpoints)
        write_text(checkpoints / LATEST, folder.name + "\n")
        others = [path for path in steps_on_disk(checkpoints) if path != folder]
        for old in others[: max(0, len(others) - keep + 1)]:
            shutil.rmtree(old)
    return folder


def set_aside(checkpoints: Path, folders: Sequence[Path]) -> None:
    """Hide checkpoints that are not to be found again, without destroying them: `.damaged-step-...`."""
    if not folders:
        return
    with storage_errors(checkpoints, "rename a checkpoint in"):
        for folder in folders:
            hidden = checkpoints / f".damaged-{folder.name}"
            shutil.rmtree(hidden, ignore_errors=True)
            folder.rename(hidden)
        sync_folder(checkpoints)


def _is_sound(folder: Path) -> bool:
    try:
        open_checkpoint(folder)
    except InputError:
        return False
    return True


def _check_finite(weights: Mapping[str, Tensor], step: int) -> None:
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise DivergedError(
                f"update {step} left {name} with a value that is not finite, so no checkpoint was written over the "
                "healthy ones before it; lower schedule.learning_rate or set schedule.clip = 1.0"
            )


def steps_on_disk(checkpoints: Path) -> list[Path]:
    """Folders of finished checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if _FOLDER.match(path.name)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Updates done at the checkpoint in `folder`, from its name."""
    return int(folder.name.removeprefix("step-"))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint folder.

    Raises:
        InputError: a file is missing, cut or changed, or the format is a newer one.
    """
    manifest = _read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{folder / MANIFEST}: format {manifest.get('format')!r}, this version reads {FORMAT}; "
            f"{_other_ways(folder)}"
        )
    step, files = manifest.get("step"), manifest.get("files")
    if (
        type(step) is not int
        or folder.name != f"step-{step:08d}"
        or not isinstance(files, dict)
        or set(files) != {WEIGHTS, METHOD, STATE}
        or not all(isinstance(expected, dict) and {"bytes", "sha256"} <= set(expected) for expected in files.values())
    ):
        raise InputError(f"{folder / MANIFEST} is not the manifest of this checkpoint; {_other_ways(folder)}")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"the checkpoint {folder} lacks {name}; {_other_ways(folder)}")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise InputError(f"{path} has {size} bytes, {expected['bytes']} were written; {_other_ways(folder)}")
        if file_sha256(path) != expected["sha256"]:
            raise InputError(f"{path} is not what was written (its SHA-256 differs); {_other_ways(folder)}")
    return Checkpoint(folder, step, _read_json(folder / STATE))


def _other_ways(folder: Path) -> str:
    older = [path for path in steps_on_disk(folder.parent) if path.name < folder.name]
    if older:
        return f"go back to an older one: pretrain --resume latest-good, or evaluate --step {step_of(older[-1])}"
    return "there is no older checkpoint in this run"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except InputError as error:
        raise InputError(f"{error}; {_other_ways(path.parent)}") from error


def find_checkpoint(checkpoints: Path, *, fall_back: bool) -> Checkpoint | None:
    """The newest checkpoint of a run, or None if it has none.

    Args:
        checkpoints: folder that holds all of a run.
        fall_back: go on to older ones when the newest is damaged.

    Raises:
        InputError: the newest (with `fall_back`: every) checkpoint is damaged.
    """
    folders = steps_on_disk(checkpoints)[::-1]
    for folder in folders:
        try:
            return open_checkpoint(folder)
        except InputError:
            if not fall_back or folder == folders[-1]:
                raise
    return None
