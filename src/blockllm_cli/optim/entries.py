"""Which entries of a piece are kept, in as few bytes as that takes, and how they are chosen.

Forms: `none` (all of them), `bitmap` (a bit for each entry of the piece), `int32` (a position for each kept entry). For
row masks the same forms speak of rows. Positions are row-major and ascending everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import gcd, prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from blockllm_cli.errors import InputError
from blockllm_cli.optim.bitmap import expanded, packed, slice_counts

Form = Literal["none", "bitmap", "int32"]
Unit = Literal["entry", "row"]

_GATHERED = 2**18
"""Entries that are gathered or scattered at a time where positions have to be made first."""

_ALIGNED = 64
"""Chunks begin at multiples of this many entries, so that vector units see them as they see the whole."""


class Chunk(NamedTuple):
    """Consecutive kept entries.

    Attributes:
        start: number of the first among the kept entries.
        units: their positions, or the numbers of their rows; int64 or int32, ascending.
        width: entries of a unit.
    """

    start: int
    units: Tensor
    width: int

    @property
    def size(self) -> int:
        """Entries."""
        return self.units.numel() * self.width

    def gather(self, tensor: Tensor, out: Tensor) -> None:
        """Copy the entries of `tensor` (contiguous, in the piece's shape) to `out` (1-D, of its dtype)."""
        torch.index_select(self._by_unit(tensor), 0, self.units, out=self._by_unit(out))

    def scatter_(self, tensor: Tensor, values: Tensor) -> None:
        """Write `values` (1-D, of its dtype) to the entries of `tensor` (contiguous, in the piece's shape)."""
        self._by_unit(tensor).index_copy_(0, self.units.long(), self._by_unit(values))

    def _by_unit(self, tensor: Tensor) -> Tensor:
        # Rows of one entry are copied like rows, ten times slower than entries.
        return tensor.view(-1) if self.width == 1 else tensor.view(-1, self.width)


class Entries:
    """A fixed set of entries of one piece.

    Attributes:
        shape: of the piece.
        form: see the module.
        unit: whether bits and positions stand for entries or for rows.
        index: the tensor that holds the set (uint8 or int32, 1-D), or None for all.
        width: entries of a unit: 1, or those of a row.
        count: entries kept.
    """

    def __init__(self, shape: tuple[int, ...], form: Form, unit: Unit, index: Tensor | None, chosen: int) -> None:
        self.shape = shape
        self.form: Form = form
        self.unit: Unit = unit
        self.index = index
        self._chosen = chosen
        self._slices = slice_counts(index) if form == "bitmap" and index is not None else []
        self.width = 1 if unit == "entry" else prod(shape[1:])
        self.count = chosen * self.width

    @classmethod
    def all(cls, shape: tuple[int, ...]) -> Entries:
        """Every entry."""
        return cls(tuple(shape), "none", "entry", None, prod(shape))

    @classmethod
    def of(cls, positions: Tensor, shape: tuple[int, ...], unit: Unit = "entry") -> Entries:
        """The entries (or rows) at `positions`, int64, ascending, each once; in the smallest form.

        Raises:
            ValueError: the piece has more than 2**31 entries, which int32 cannot name.
        """
        shape = tuple(shape)
        units = prod(shape) if unit == "entry" else shape[0]
        positions = positions.contiguous()
        if positions.numel() == units:
            return cls.all(shape)
        if units > 2**31:
            raise ValueError(f"a piece of {units} entries is too large for int32 positions")
        if -(-units // 8) < 4 * positions.numel():
            return cls(shape, "bitmap", unit, packed(positions, units), positions.numel())
        return cls(shape, "int32", unit, positions.to(torch.int32), positions.numel())

    @property
    def bytes(self) -> int:
        """Bytes of the index."""
        return 0 if self.index is None else self.index.numel() * self.index.element_size()

    @property
    def is_all(self) -> bool:
        """Whether every entry is kept."""
        return self.form == "none"

    def wanted_rows(self) -> Tensor | None:
        """The kept rows, int64, if whole rows are what is kept; else None."""
        return self._units() if self.unit == "row" else None

    def units(self, device: torch.device, unit: Unit | None = None) -> Tensor:
        """Positions of the kept entries, or numbers of the kept rows, int64 ascending, on `device`.

        Args:
            device: of the result.
            unit: which of the two; None is what the set is made of. Rows only if whole rows are kept.
        """
        unit = self.unit if unit is None else unit
        if self.is_all:
            return torch.arange(self.shape[0] if unit == "row" else self.count, device=device)
        assert unit == "entry" or self.unit == "row"
        return (self._units() if unit == self.unit else self.positions()).to(device)

    def positions(self) -> Tensor:
        """Positions of the kept entries in the flattened piece, int64 (count,)."""
        if self.is_all:
            raise ValueError("all entries are kept: there are no positions to speak of")
        units = self._units()
        if self.unit == "entry":
            return units
        within = torch.arange(self.width, device=units.device)
        return (units.unsqueeze(1) * self.width + within).view(-1)

    def chunks(self, entries: int) -> Iterator[Chunk]:
        """The kept entries in order, about `entries` at a time; not for all entries.

        Chunks but the last have the largest multiple of 64 up to `entries`, or, of rows, as many as that takes at
        least.
        """
        assert self.index is not None
        least = _ALIGNED // gcd(self.width, _ALIGNED)
        size = max(1, entries // (self.width * least)) * least
        start = 0
        for index in self._units_by(size):
            yield Chunk(start, index, self.width)
            start += index.numel() * self.width

    def gather(self, tensor: Tensor) -> Tensor:
        """The kept entries of `tensor` (in the piece's shape), 1-D (count,); a view if they are all."""
        if self.is_all:
            return tensor.reshape(-1)
        tensor = tensor.contiguous()
        gathered = tensor.new_empty(self.count)
        for chunk in self.chunks(_GATHERED):
            chunk.gather(tensor, gathered[chunk.start : chunk.start + chunk.size])
        return gathered

    def scatter_(self, tensor: Tensor, values: Tensor) -> None:
        """Write `values` (count,) to the kept entries of `tensor` (contiguous, in the piece's shape)."""
        if self.is_all:
            tensor.view(-1).copy_(values)
            return
        for chunk in self.chunks(_GATHERED):
            chunk.scatter_(tensor, values[chunk.start : chunk.start + chunk.size])

    def state(self) -> dict[str, Any]:
        """Plain values from which, with `index`, `restore` makes an equal object."""
        return {"shape": list(self.shape), "form": self.form, "unit": self.unit, "chosen": self._chosen}

    @classmethod
    def restore(cls, saved: dict[str, Any], index: Tensor | None) -> Entries:
        """From what `state` gave and the saved index.

        Raises:
            InputError: the index is not what the values speak of.
        """
        wanted = cls.stored_index(saved)
        found = None if index is None else (tuple(index.shape), index.dtype)
        if found != wanted:
            raise InputError(f"an index of kept entries is {found}, {wanted} is wanted for {saved}")
        made = cls(tuple(saved["shape"]), saved["form"], saved["unit"], index, saved["chosen"])
        if made.form == "bitmap" and sum(made._slices) != saved["chosen"]:
            raise InputError(f"an index of kept entries has {sum(made._slices)} bits set, not as {saved} says")
        return made

    @staticmethod
    def stored_index(saved: Mapping[str, Any]) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and dtype of the index that belongs to what `state` gave; None if there is none."""
        units = prod(saved["shape"]) if saved["unit"] == "entry" else saved["shape"][0]
        if saved["form"] == "none":
            return None
        return ((-(-units // 8),), torch.uint8) if saved["form"] == "bitmap" else ((saved["chosen"],), torch.int32)

    def _units(self) -> Tensor:
        assert self.index is not None
        if self.form == "int32":
            return self.index.long()
        return torch.cat(list(expanded(self.index, self._slices)))

    def _units_by(self, size: int) -> Iterator[Tensor]:
        """The units, `size` at a time."""
        assert self.index is not None
        if self.form == "int32":
            yield from [self.index] if self._chosen <= size else torch.split(self.index, size)
            return
        waiting: list[Tensor] = []
        count = 0
        for positions in expanded(self.index, self._slices):
            waiting.append(positions)
            count += positions.numel()
            if count >= size:
                whole = count // size * size
                joined = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
                yield from torch.split(joined[:whole], size)
                waiting, count = [joined[whole:]], count - whole
        if count:
            yield torch.cat(waiting)


def positions_within(positions: Tensor, others: Tensor) -> Tensor:
    """Which of `positions` are among `others`; both int64, ascending, each once. Bool, as `positions`."""
    if others.numel() == 0:
        return torch.zeros_like(positions, dtype=torch.bool)
    places = torch.searchsorted(others, positions).clamp_(max=others.numel() - 1)
    return others[places] == positions
