"""Installs the routes of one pass on a model and takes them off again.

A parameter is fed in one of two ways. Usually by a hook that fires when autograd has finished its gradient; it hands
the gradient to the routes and drops it from the parameter at once, so that in eager mode one gradient is in flight at a
time. If all routes of a linear layer's weight want some rows only, the layer itself makes the product of these rows and
hands it to them; a compiled layer (`model.compiled`) feeds all of its weights so. Parameters without a route have
`requires_grad` off for the duration of the pass, so autograd makes no product for them and saves no input of theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from blockllm_cli.gradients.routes import Route
from blockllm_cli.model.linears import Feed, SelfFeeding, Wanted


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
        feeding: "hook" feeds every parameter by a hook; the results are the same to rounding. With "auto", a layer
            whose weight is written in the backward pass has to be called once in a forward pass.

    Raises:
        KeyError: a route names a parameter that the model does not have.
        ValueError: two routes would consume the same row of a gradient, or one wants rows that are not there.
    """
    parameters = dict(model.named_parameters())
    by_parameter = _by_parameter(routes, parameters)
    own_layers = _layers(model) if feeding == "auto" else {}
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    handles: list[RemovableHandle] = []
    layers: list[SelfFeeding] = []
    try:
        for name, parameter in parameters.items():
            mine = by_parameter.get(name, [])
            parameter.grad = None
            parameter.requires_grad_(bool(mine))
            if not mine:
                continue
            layer = own_layers.get(parameter)
            feeds = () if layer is None else _feeds(mine, layer)
            if layer is not None and feeds:
                layer.feeds = feeds
                layers.append(layer)
            else:
                register: Any = parameter.register_post_accumulate_grad_hook  # untyped in torch
                handles.append(register(_feeder(mine)))
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
    """The routes of each parameter, those that consume the gradient last."""
    found: dict[str, list[Route]] = {}
    for key, route in routes.items():
        name = key.partition("@")[0]
        if name not in parameters:
            raise KeyError(f"a route names {name!r}, which is no parameter of the model")
        found.setdefault(name, []).append(route)
    for name, mine in found.items():
        mine.sort(key=lambda route: route.consumes)
        _check(name, len(parameters[name]), mine)
    return found


def _check(name: str, rows: int, routes: Sequence[Route]) -> None:
    consumed = []
    for route in routes:
        wanted = route.wanted_rows()
        if isinstance(wanted, slice) and wanted.stop > rows:
            raise ValueError(f"a route wants rows {wanted.start} to {wanted.stop} of {name}, which has {rows}")
        if route.consumes:
            consumed.append((wanted.start, wanted.stop) if isinstance(wanted, slice) else (0, rows))
    consumed.sort()
    if any(start < stop for (_, stop), (start, _) in pairwise(consumed)):
        raise ValueError(f"two routes of {name} want the same rows of its gradient for themselves")


def _layers(model: nn.Module) -> dict[Tensor, SelfFeeding]:
    """The layer of each weight that belongs to a `SelfFeeding` module and to no other."""
    uses = Counter[Tensor](parameter for module in model.modules() for parameter in module.parameters(recurse=False))
    return {
        module.weight: module
        for module in model.modules()
        if isinstance(module, SelfFeeding) and uses[module.weight] == 1
    }


class _SharedRows:
    """A feed for all routes that want the same contiguous rows, whose product is so made once."""

    def __init__(self, rows: slice) -> None:
        self._rows = rows
        self.routes: list[Route] = []

    def wanted_rows(self) -> Wanted:
        return self._rows

    def accept_rows(self, rows: Tensor) -> None:
        for route in self.routes:
            route.accept_rows(rows)


class _Whole:
    """A feed for routes of which one wants the whole gradient: all are served from one product."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = routes

    def wanted_rows(self) -> None:
        return

    def accept_rows(self, rows: Tensor) -> None:
        for route in self._routes:
            route.accept(rows)


def _feeds(routes: Sequence[Route], layer: SelfFeeding) -> tuple[Feed, ...]:
    """What `layer` feeds instead of `routes`; nothing if these are better served by a hook."""
    if not layer.feeds_rows or any(route.wanted_rows() is None for route in routes):
        return (_Whole(routes),) if layer.feeds_all else ()
    feeds: list[Feed] = []
    shared: dict[tuple[int, int], _SharedRows] = {}
    for route in routes:
        wanted = route.wanted_rows()
        assert wanted is not None
        if not isinstance(wanted, slice):
            feeds.append(route)
            continue
        bounds = (wanted.start, wanted.stop)
        if bounds not in shared:
            shared[bounds] = _SharedRows(wanted)
        shared[bounds].routes.append(route)
    return (*feeds, *shared.values())


def _feeder(routes: Sequence[Route]) -> Callable[[Tensor], None]:
    def feed(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        for route in routes:
            route.accept(gradient)

    return feed
