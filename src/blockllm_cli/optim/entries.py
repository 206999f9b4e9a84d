"""Which entries of a piece are kept, in as few bytes as that takes, and how they are chosen.

Forms: `none` (all of them), `bitmap` (a bit for each entry of the piece), `int32` (a position for each kept entry). For
row masks the same forms speak of rows. Positions are row-major and ascending everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from blockllm_cli.errors import InputError

Form = Literal["none", "bitmap", "int32"]
Unit = Literal["entry", "row"]

_SLICE = 2**20
"""Entries of a bitmap that are expanded at a time: 1 MiB of flags and at most 8 MiB of positions."""


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
        self._slices = _slice_counts(index) if form == "bitmap" and index is not None else []
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
            return cls(shape, "bitmap", unit, _packed(positions, units), positions.numel())
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

    def gather(self, tensor: Tensor) -> Tensor:
        """The kept entries of `tensor` (in the piece's shape), 1-D (count,); a view if they are all."""
        flat = tensor.reshape(-1)
        if self.is_all:
            return flat
        if self.unit == "row":
            return tensor.reshape(self.shape[0], -1).index_select(0, self._units()).view(-1)
        if self.form == "int32":
            assert self.index is not None
            return flat.index_select(0, self.index)
        return torch.cat([flat[start : start + _SLICE].index_select(0, part) for start, part in self._expanded()])

    def scatter_(self, tensor: Tensor, values: Tensor) -> None:
        """Write `values` (count,) to the kept entries of `tensor` (contiguous, in the piece's shape)."""
        flat = tensor.view(-1)
        if self.is_all:
            flat.copy_(values)
        elif self.unit == "row":
            tensor.view(self.shape[0], -1).index_copy_(0, self._units(), values.view(-1, self.width))
        elif self.form == "int32":
            assert self.index is not None
            flat.index_copy_(0, self.index.long(), values)
        else:
            done = 0
            for start, part in self._expanded():
                flat[start : start + _SLICE].index_copy_(0, part, values[done : done + part.numel()])
                done += part.numel()

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
        return torch.cat([part + start for start, part in self._expanded()])

    def _expanded(self) -> Iterator[tuple[int, Tensor]]:
        """(first position, set positions relative to it as int64) of consecutive slices of a bitmap.

        Their number is known beforehand, so that the host need not wait for the device.
        """
        assert self.index is not None
        for number, (start, flags) in enumerate(_flags(self.index)):
            yield start, torch.nonzero_static(flags, size=self._slices[number]).view(-1)


def _flags(bitmap: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first position, a uint8 flag for each position) of consecutive slices of a bitmap."""
    bits = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    for start in range(0, bitmap.numel(), _SLICE // 8):
        part = bitmap[start : start + _SLICE // 8]
        yield start * 8, (part.unsqueeze(1) >> bits).bitwise_and_(1).view(-1)


def _slice_counts(bitmap: Tensor) -> list[int]:
    """Bits set in each of the slices of `_flags`, read in one transfer."""
    counts = [flags.count_nonzero() for _, flags in _flags(bitmap)]
    return [int(count) for count in torch.stack(counts).tolist()] if counts else []


def _packed(positions: Tensor, units: int) -> Tensor:
    """A bit for each of `units`, the lowest bit of a byte first; uint8 (ceil(units / 8),)."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=positions.device)
    packed = []
    for start in range(0, units, _SLICE):
        size = min(_SLICE, units - start)
        flags = torch.zeros(-(-size // 8) * 8, dtype=torch.uint8, device=positions.device)
        inside = torch.searchsorted(positions, torch.tensor([start, start + size], device=positions.device))
        flags[positions[inside[0] : inside[1]] - start] = 1
        packed.append((flags.view(-1, 8) * weights).sum(1, dtype=torch.uint8))
    return torch.cat(packed)


def positions_within(positions: Tensor, others: Tensor) -> Tensor:
    """Which of `positions` are among `others`; both int64, ascending, each once. Bool, as `positions`."""
    if others.numel() == 0:
        return torch.zeros_like(positions, dtype=torch.bool)
    places = torch.searchsorted(others, positions).clamp_(max=others.numel() - 1)
    return others[places] == positions


def largest_entries(gradient: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest magnitudes, int64, ascending; ties go to the lower position.

    Args:
        gradient: any shape and float dtype of 16 bits or more; not modified. NaN counts as larger than infinity, so
            that what is kept of a gradient that is not finite is not finite either, which the kept norm shows.
        count: 0 to the number of entries.
    """
    return _largest(gradient.reshape(-1), count)


def largest_rows(gradient: Tensor, count: int) -> Tensor:
    """Indices of the `count` rows with the largest Euclidean norm (fp32), int64, ascending; ties as above."""
    rows = gradient.reshape(gradient.shape[0], -1)
    return _largest(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32), count)


def _largest(values: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest magnitudes of a 1-D tensor; memory is bounded by a slice and the result."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    threshold, ties = _threshold(values, count)
    chosen = []
    for start, keys in _keys(values):
        taken = keys > threshold
        equal = (keys == threshold).nonzero().view(-1)[:ties]
        taken[equal] = True
        ties -= equal.numel()
        chosen.append(taken.nonzero().view(-1) + start)
    return torch.cat(chosen)


def _threshold(values: Tensor, count: int) -> tuple[int, int]:
    """The `count`-th largest key, and how many of the keys equal to it are among the `count` largest.

    A radix selection: the key is found 16 bits at a time by counting how often each value of these bits occurs among
    the keys that agree with what was found before. Counts are exact, so the result is the same on every device.
    """
    highest = 8 * values.element_size() - 16
    found = 0
    for shift in range(highest, -1, -16):
        times = torch.zeros(2**16, dtype=torch.int64, device=values.device)
        for _, keys in _keys(values):
            digits = keys >> shift
            if shift != highest:
                digits = digits[keys >> (shift + 16) == found].bitwise_and_(2**16 - 1)
            times += torch.bincount(digits, minlength=2**16)
        at_least = times.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= count).count_nonzero()) - 1
        count -= int(at_least[digit] - times[digit])
        found = found << 16 | digit
    return found, count


def _keys(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first position, whole numbers in the order of the magnitudes) of consecutive slices: the bits without sign."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    for start in range(0, values.numel(), _SLICE):
        yield start, values[start : start + _SLICE].abs().view(whole)
