"""Installs the routes of one pass on a model and takes them off again.

A parameter is fed in one of two ways. Usually by a hook that fires when autograd has finished its gradient; it hands
the gradient to the routes and drops it from the parameter at once, so that in eager mode one gradient is in flight at a
time. If all routes of a linear layer's weight want some rows only, the layer itself makes the product of these rows and
hands it to them. Parameters without a route have `requires_grad` off for the duration of the pass, so autograd makes no
product for them and saves no input of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from blockllm_cli.gradients.routes import Route
from blockllm_cli.model.linears import Linear


@contextmanager
def routed(
    model: nn.Module, routes: Mapping[str, Route], *, feeding: Literal["auto", "hook"] = "auto"
) -> Iterator[None]:
    """Within the block, every backward pass of `model` feeds `routes` and nothing else.

    `parameter.grad` is None from the start of the block (a gradient left there by others is dropped) to after its end,
    a hook's own time excepted. However the block ends, no hook stays, and `requires_grad` of every parameter is again
    what it was before.

    Args:
        model: any; the layers that can feed by themselves are `Linear`.
        routes: keyed by parameter name, or by `<parameter>@<anything>` for one of several routes of a parameter.
        feeding: "hook" feeds every parameter by a hook; the results are the same to rounding.

    Raises:
        KeyError: a route names a parameter that the model does not have.
        ValueError: two routes of one parameter want its gradient for themselves.
    """
    parameters = dict(model.named_parameters())
    by_parameter = _by_parameter(routes, parameters)
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    handles: list[RemovableHandle] = []
    layers: list[Linear] = []
    try:
        for name, parameter in parameters.items():
            mine = by_parameter.get(name, [])
            parameter.grad = None
            parameter.requires_grad_(bool(mine))
            layer = _layer(model, name) if feeding == "auto" else None
            if not mine:
                continue
            if layer is not None and all(route.wanted_rows() is not None for route in mine):
                layer.feeds = tuple(mine)
                layers.append(layer)
            else:
                register = parameter.register_post_accumulate_grad_hook  # untyped in torch
                handles.append(register(_feeder(mine)))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.feeds = ()
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(before[name])


def _by_parameter(routes: Mapping[str, Route], parameters: Mapping[str, Tensor]) -> dict[str, list[Route]]:
    """The routes of each parameter, one that consumes the gradient last."""
    found: dict[str, list[Route]] = {}
    for key, route in routes.items():
        name = key.partition("@")[0]
        if name not in parameters:
            raise KeyError(f"a route names {name!r}, which is no parameter of the model")
        found.setdefault(name, []).append(route)
    for name, mine in found.items():
        if sum(route.consumes for route in mine) > 1:
            raise ValueError(f"two routes of {name} want its gradient for themselves")
        mine.sort(key=lambda route: route.consumes)
    return found


def _layer(model: nn.Module, name: str) -> Linear | None:
    """The layer that can make the gradient of the parameter `name` itself, or None."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    return module if isinstance(module, Linear) and attribute == "weight" else None


def _feeder(routes: Sequence[Route]) -> Callable[[Tensor], None]:
    def feed(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        for route in routes:
            route.accept(gradient)

    return feed
