"""Stored weights, read tensor by tensor, and put into a model: strict, in place."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blockllm_cli.durable import sync_file
from blockllm_cli.errors import InputError


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name; each is read when it is asked for and not kept."""

    def __init__(self, path: Path) -> None:
        try:
            opened: Any = safe_open(path, framework="pt", device="cpu")  # untyped
        except (SafetensorError, OSError) as error:
            raise InputError(f"cannot read {path}: {error}") from error
        self._file = opened
        self._names: list[str] = list(opened.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def form(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype (in safetensors' words, such as "BF16") of a tensor, which is not read for it."""
        stored = self._file.get_slice(name)
        return tuple(stored.get_shape()), str(stored.get_dtype())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` (any device) as a safetensors file and sync it.

    Raises:
        OSError: the disk refuses; the number is that of the cause, whatever words the library has for it.
    """
    content = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(content, path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        # The library reports a full disk in words only; the number is what `storage_errors` explains.
        code = re.search(r"os error (\d+)|code: (\d+)", str(error))
        number = int(next(group for group in code.groups() if group)) if code else 0
        raise OSError(number, os.strerror(number) if number else str(error), str(path)) from error
    path.chmod(mode)  # the library writes files that nobody else may read, whatever the umask
    sync_file(path)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the parameters of `model` of the same names; nothing is written unless all of them fit.

    Raises:
        InputError: a tensor is missing, unexpected, or of another shape or dtype than its parameter.
    """
    parameters = dict(model.named_parameters())
    for name in parameters:
        if name not in tensors:
            raise InputError(f"the stored weights lack {name!r}, which the model needs")
    for name, tensor in tensors.items():
        if name not in parameters:
            raise InputError(f"the stored weights hold {name!r}, which the model does not have")
        expected = parameters[name]
        if tensor.shape != expected.shape:
            raise InputError(
                f"the stored weight {name!r} has shape {tuple(tensor.shape)}, the model's has {tuple(expected.shape)}"
            )
        if tensor.dtype != expected.dtype:
            raise InputError(f"the stored weight {name!r} is {tensor.dtype}, the model's is {expected.dtype}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
