"""Installs the routes of one pass on a model and takes them off again.

Each routed parameter gets one hook that fires when autograd has finished its gradient; the hook hands the gradient to
the route and drops it from the parameter at once, so that in eager mode one gradient is in flight at a time.
Parameters without a route have `requires_grad` off for the duration of the pass, so autograd makes no product for them
and saves no input of theirs.
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

    `parameter.grad` is None from the start of the block (a gradient left there by others is dropped) to after its end,
    a hook's own time excepted. However the block ends, no hook stays, and `requires_grad` of every parameter is again
    what it was before.

    Raises:
        KeyError: a route names a parameter that the model does not have.
    """
    parameters = dict(model.named_parameters())
    unknown = [name for name in routes if name not in parameters]
    if unknown:
        raise KeyError(f"a route names {unknown[0]!r}, which is no parameter of the model")
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    handles: list[RemovableHandle] = []
    try:
        for name, parameter in parameters.items():
            route = routes.get(name)
            parameter.grad = None
            parameter.requires_grad_(route is not None)
            if route is not None:
                register = parameter.register_post_accumulate_grad_hook  # untyped in torch
                handles.append(register(_feeder(route)))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(before[name])


def _feeder(route: Route) -> Callable[[Tensor], None]:
    def feed(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        route.accept(gradient)

    return feed
