"""Calls of own autograd functions, with a type."""

from __future__ import annotations

from typing import Any

from torch.autograd import Function


def applied(function: type[Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, which torch leaves without types; the caller names that of the result."""
    untyped: Any = function
    return untyped.apply(*arguments)
