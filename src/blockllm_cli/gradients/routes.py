"""Where the gradient of one parameter goes during one pass.

A route is handed the gradient of each micro-batch the moment it exists and keeps what its rule needs. Every route that
accumulates is linear, so what it holds after the last micro-batch does not depend on how the batch was cut. A parameter
without a route is frozen: autograd makes no weight-gradient product for it and need not save that product's input.

A parameter may have several routes. Most read the gradient and copy what they keep; a route that *consumes* it, or some
rows of it, is fed after these and owns them from then on, so no two routes may consume the same row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from blockllm_cli.model.linears import Wanted
from blockllm_cli.optim.entries import Entries


class Route(ABC):
    """Keeps something of one parameter's gradient, summed over the micro-batches of a pass.

    Attributes:
        consumes: whether `accept` keeps or overwrites the tensor it is handed.
        writes: whether `accept` writes weights, so that the loss has to be looked at before the backward pass.
    """

    consumes: bool = False
    writes: bool = False

    @abstractmethod
    def accept(self, gradient: Tensor) -> None:
        """Take the gradient of one micro-batch, in the parameter's shape and dtype."""

    def wanted_rows(self) -> Wanted | None:
        """The rows that are all this route needs to see, which it then takes by `accept_rows`; None: it needs all."""
        return None

    def accept_rows(self, rows: Tensor) -> None:
        """Take the wanted rows of one micro-batch's gradient: all of it, unless `wanted_rows` says otherwise.

        Rows that are wanted by number are made for this route alone.
        """
        self.accept(rows)

    @abstractmethod
    def result(self) -> Tensor | None:
        """What is kept after the last micro-batch, or None if no micro-batch reached the parameter."""

    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes that the route holds now."""


class Dense(Route):
    """Keeps the full gradient, summed.

    Args:
        dtype: element type of the sum; None keeps that of the gradient. With an equal dtype the first gradient itself
            becomes the accumulator, so a single micro-batch costs no copy. That is safe because autograd hands a leaf
            a buffer of its own, copying one that is still in use elsewhere; only a part of a larger buffer (the
            gradient of `cat`, say) comes as it is, and is copied here, so that the rest of the buffer is not held.
    """

    consumes = True

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self._sum: Tensor | None = None

    def accept(self, gradient: Tensor) -> None:
        """Add `gradient` to the sum in the accumulator's dtype."""
        if self._sum is None:
            total = gradient if self._dtype is None else gradient.to(self._dtype)
            self._sum = total if total.untyped_storage().nbytes() == total.nbytes else total.clone()
        else:
            self._sum.add_(gradient)

    def result(self) -> Tensor | None:
        """The summed gradient, in the parameter's shape and the accumulator's dtype."""
        return self._sum

    def held_bytes(self) -> int:
        """Bytes of the accumulator."""
        return _bytes(self._sum)


class Gather(Route):
    """Keeps the gradient of some entries only, summed, 1-D.

    Args:
        entries: which; if they are whole rows, only these rows' products need be made.
        dtype: element type of the sum; None keeps that of the gradient.
    """

    def __init__(self, entries: Entries, dtype: torch.dtype | None = None) -> None:
        self._entries = entries
        self._rows = entries.wanted_rows()
        self._dtype = dtype
        self._sum: Tensor | None = None

    def accept(self, gradient: Tensor) -> None:
        """Add the kept entries of `gradient`."""
        kept = self._entries.gather(gradient)
        is_view = kept.untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr()
        self._add(kept.clone() if is_view and self._sum is None else kept)

    def wanted_rows(self) -> Wanted | None:
        """The kept rows, if whole rows are kept."""
        return self._rows

    def accept_rows(self, rows: Tensor) -> None:
        """Add the kept rows, or the kept entries if these are no whole rows."""
        if self._rows is None:
            self.accept(rows)
        else:
            self._add(rows.reshape(-1))

    def _add(self, kept: Tensor) -> None:
        if self._sum is None:
            self._sum = kept if self._dtype is None else kept.to(self._dtype)
        else:
            self._sum.add_(kept)

    def result(self) -> Tensor | None:
        """The summed gradient of the kept entries, 1-D (entries.count,), row-major."""
        return self._sum

    def held_bytes(self) -> int:
        """Bytes of the kept entries' sum."""
        return _bytes(self._sum)


class Rows(Route):
    """Shows only the rows from `start` to before `stop` to another route.

    Args:
        start: first row.
        stop: the one after the last.
        inner: is fed with these rows as if they were the whole parameter. If it consumes them, it owns these rows.

    Raises:
        ValueError: these are no rows.
    """

    def __init__(self, start: int, stop: int, inner: Route) -> None:
        if not 0 <= start < stop:
            raise ValueError(f"rows {start} to {stop} are no range of rows")
        self._rows = slice(start, stop)
        self._inner = inner
        self.consumes = inner.consumes
        self.writes = inner.writes

    def accept(self, gradient: Tensor) -> None:
        """Hand on a view of the rows."""
        self._inner.accept(gradient[self._rows])

    def wanted_rows(self) -> Wanted | None:
        """The rows, or those of them that the route within wants."""
        within = self._inner.wanted_rows()
        if within is None:
            return self._rows
        if isinstance(within, slice):
            return slice(self._rows.start + within.start, self._rows.start + within.stop)
        return within + self._rows.start

    def accept_rows(self, rows: Tensor) -> None:
        """Hand the wanted rows on."""
        self._inner.accept_rows(rows)

    def result(self) -> Tensor | None:
        """The result of the route within."""
        return self._inner.result()

    def held_bytes(self) -> int:
        """Bytes that the route within holds."""
        return self._inner.held_bytes()


class Layerwise(Route):
    """Keeps nothing: an update is made inside the backward pass. For one micro-batch per update only.

    Args:
        write: is handed the gradient, which it may overwrite, when nothing in the backward pass needs the weight any
            more.
    """

    consumes = True
    writes = True

    def __init__(self, write: Callable[[Tensor], None]) -> None:
        self._write = write

    @torch.no_grad()
    def accept(self, gradient: Tensor) -> None:
        """Make the update."""
        self._write(gradient)

    def result(self) -> None:
        """Nothing is kept."""
        return

    def held_bytes(self) -> int:
        """Nothing is kept."""
        return 0


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.untyped_storage().nbytes()
