"""Putting stored weights into a model: strict, in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from blockllm_cli.errors import InputError


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
