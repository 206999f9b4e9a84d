"""Installs the routes of one pass on a model and takes them off again.

Each routed parameter gets one hook that fires when autograd has finished its gradient; the hook hands the gradient to
the route and drops it from the parameter at once, so that in eager mode one gradient is in flight at a time. Parameters
without a route have `requires_grad` off for the duration of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from blockllm_cli.gradients.routes import Route


@contextmanager
def routed(model: nn.Module, routes: Mapping[str, Route]) -> Iterator[None]:
    """Within the block, every backward pass of `model` feeds `routes` (parameter name -> route) and nothing else.

    `parameter.grad` is None before, during (outside a hook) and after the block.

    Raises:
        KeyError: a route names a parameter that the model does not have.
    """
    parameters = dict(model.named_parameters())
    unknown = [name for name in routes if name not in parameters]
    if unknown:
        raise KeyError(f"a route names {unknown[0]!r}, which is no parameter of the model")
    handles: list[RemovableHandle] = []
    try:
        for name, parameter in parameters.items():
            route = routes.get(name)
            parameter.requires_grad_(route is not None)
            if route is not None:
                register = parameter.register_post_accumulate_grad_hook  # untyped in torch
                handles.append(register(_feeder(route)))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters.values():
            parameter.grad = None


def _feeder(route: Route) -> Callable[[Tensor], None]:
    def feed(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        route.accept(gradient)

    return feed
