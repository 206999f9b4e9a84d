"""Adam over the kept entries of many records in one kernel launch, on CUDA devices with Triton.

Records are launched together whatever their number; entries that are named in another way (all, int32 positions, rows,
bitmap), or whose addresses forbid wide loads, take a launch of their own: at most eight, and one or two in practice.
What a selection fixes lies in tables on the device that are made once for it; an update uploads one address and three
numbers for each record, and the host never waits. The tables take 4 bytes for each `BLOCK` kept entries (8 for each
`BLOCK` positions of a bitmap) and about 100 bytes a record.

Draws of stochastic rounding are keyed by (seed, parameter, update, position in the parameter, which tensor): not by
record, piece or tile, so that entries round alike however they are held. They are other draws than on the CPU.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from blockllm_cli.optim.adam import AdamRule
from blockllm_cli.optim.entries import Entries
from blockllm_cli.optim.precision import Precision, precision_of
from blockllm_cli.optim.rules import DenseRule

BLOCK = 1024
"""Entries of a tile: eight for each of 128 threads, which is 16 bytes of bf16 for each of them."""
WARPS = 4
ALIGNMENT = 16
"""Bytes of the widest load."""


def triton_adam(rule: DenseRule, precision: Precision, seed: int, weights: Iterable[Tensor]) -> TritonAdam | None:
    """What updates `weights`, all on one device, at once; None where torch's own kernels do."""
    first = next(iter(weights), None)
    if first is None or not isinstance(rule, AdamRule) or why_no_triton(first.device) is not None:
        return None
    return TritonAdam(rule, precision, seed)


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton serves no updates on `device`, in words for a person; None if it does.

    That a kernel can be compiled and run is found out by running one, on eight entries: it takes Triton itself, a card
    and a driver that it knows, and a C compiler.
    """
    if device.type != "cuda":
        return f"updates by Triton are for CUDA devices, not for {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        weight = torch.zeros(8, device=device)
        target = Target("", 0, weight, Entries.all((8,)), (torch.zeros_like(weight), torch.zeros_like(weight)), None)
        adam = TritonAdam(AdamRule(), precision_of("fp32"), 0)
        adam.update([target], [torch.ones_like(weight)], [(1.0, 1)], 0)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever it is, torch's kernels do the same work
        return f"Triton's kernel does not run here: {type(error).__name__}: {error}".splitlines()[0]
    return None


@dataclass(frozen=True, eq=False)
class Target:
    """Entries that the kernel updates, and the tensors that belong to them; all contiguous and on one device.

    It is known by identity: the kernel's tables are good for as long as the same objects come, and hold none of them.

    Attributes:
        parameter: names the draws.
        start: position of the piece's first entry in its parameter.
        weight: the piece, any shape; written.
        entries: which of it are updated.
        slots: the two moments, (entries.count,); written.
        master: fp32 copy of the entries, (entries.count,), or None; written.
    """

    parameter: str
    start: int
    weight: Tensor
    entries: Entries
    slots: tuple[Tensor, ...]
    master: Tensor | None


@dataclass(frozen=True)
class _Launch:
    """Tiles that one launch updates: `owners` (tiles,) int32, and for bitmaps `ranks` (tiles,) int32."""

    form: str
    is_aligned: bool
    owners: Tensor
    ranks: Tensor | None


@dataclass(frozen=True)
class _Tables:
    """What is fixed while the same targets are updated; `kept` are tensors that `records` has the addresses of."""

    targets: tuple[weakref.ref[Target], ...]
    entries: int
    records: Tensor
    launches: tuple[_Launch, ...]
    kept: tuple[Tensor, ...]

    def serve(self, targets: Sequence[Target]) -> bool:
        """Whether these are the tables of `targets`, in this order."""
        return len(targets) == len(self.targets) and all(
            ref() is target for ref, target in zip(self.targets, targets, strict=True)
        )


class TritonAdam:
    """Updates targets by one rule.

    Args:
        rule: its constants.
        precision: dtypes of weights and moments, and the rounding of bf16 writes.
        seed: of stochastic rounding.
        kernels: the module `triton_kernels`, or the same bound to Triton's interpreter; None imports it.
        block: entries of a tile, a power of two and at least 8.
    """

    def __init__(
        self, rule: AdamRule, precision: Precision, seed: int, *, kernels: Any = None, block: int = BLOCK
    ) -> None:
        if kernels is None:
            from blockllm_cli.optim import triton_kernels as kernels
        self._kernels = kernels
        self._rule = rule
        self._precision = precision
        self._seed = seed
        self._block = block
        self._tables: _Tables | None = None
        self._constants: Tensor | None = None

    @torch.no_grad()
    def update(
        self,
        targets: Sequence[Target],
        gradients: Sequence[Tensor],
        counters: Sequence[tuple[float, int]],
        draw: int,
        *,
        count_unchanged: bool = False,
    ) -> Tensor | None:
        """Apply the rule once to every target, in place.

        Args:
            targets: what is updated.
            gradients: of the entries of each target, any shape, fp32 or bf16; not modified.
            counters: learning rate of each, and number of this update since its state was zero, from 1.
            draw: number of the update in the keys of stochastic rounding.
            count_unchanged: count the entries whose bf16 weight keeps its value.

        Returns:
            Share of the entries that kept their value, a scalar on the device, if it was asked for and a bf16 weight
            is all there is of them; else None.

        Raises:
            ValueError: a gradient has not as many elements as its target has entries, or a target is not contiguous.
        """
        if not targets:
            return None
        for target, gradient in zip(targets, gradients, strict=True):
            if gradient.numel() != target.entries.count:  # the kernel does not look
                raise ValueError(
                    f"{target.parameter} has {target.entries.count} entries, its gradient {gradient.numel()}"
                )
        if self._tables is None or not self._tables.serve(targets):
            self._tables = None  # freed before anything is allocated
            self._tables = self._prepared(targets)
        if len({gradient.dtype for gradient in gradients}) > 1:
            gradients = [gradient.float() for gradient in gradients]
        counts = count_unchanged and self._precision.weights == torch.bfloat16 and not self._precision.has_master
        changed = self._launch(self._tables, [each.contiguous() for each in gradients], counters, draw, counts)
        return 1.0 - torch.stack(changed).sum() / self._tables.entries if changed else None

    def _launch(
        self,
        tables: _Tables,
        gradients: Sequence[Tensor],
        counters: Sequence[tuple[float, int]],
        draw: int,
        counts: bool,
    ) -> list[Tensor]:
        """Run the kernel over all tiles; how many weights changed in each launch, if it `counts`."""
        device = gradients[0].device
        addresses = [gradient.data_ptr() for gradient in gradients]
        is_aligned = all(address % ALIGNMENT == 0 for address in addresses)
        addressed = _uploaded(torch.tensor(addresses, dtype=torch.int64), device)
        scalars = _uploaded(torch.tensor(self._scalars(counters), dtype=torch.float32), device)
        constants = self._constants_on(device)
        changed = []
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for launch in tables.launches:
                tiles = launch.owners.numel()
                changes = torch.empty(tiles if counts else 0, dtype=torch.int32, device=device)
                self._kernels.update_entries[(tiles,)](
                    tables.records,
                    addressed,
                    scalars,
                    constants,
                    launch.owners,
                    launch.owners if launch.ranks is None else launch.ranks,
                    changes,
                    draw,
                    BLOCK=self._block,
                    FORM=launch.form,
                    GRADIENT=self._type(gradients[0].dtype),
                    COUNT=counts,
                    ALIGNED=launch.is_aligned and is_aligned,
                    **self._options(),
                )
                if counts:
                    changed.append(changes.sum())
        return changed

    def _options(self) -> dict[str, Any]:
        """What is the same in every launch. Without fusion the compiler adds no fma to those that are asked for."""
        rule, precision = self._rule, self._precision
        decay = "none" if rule.weight_decay == 0 else "decoupled" if rule.decoupled else "l2"
        return {
            "WEIGHT": self._type(precision.weights),
            "MOMENT": self._type(precision.moments),
            "MASTER": precision.has_master,
            "FROM_MOMENT": rule.betas[0] > 0.5,
            "DECAY": decay,
            "STOCHASTIC": precision.rounding == "stochastic",
            "num_warps": WARPS,
            "enable_fp_fusion": False,
        }

    def _type(self, dtype: torch.dtype) -> Any:
        language = self._kernels.tl
        return {torch.float32: language.float32, torch.bfloat16: language.bfloat16}[dtype]

    def _constants_on(self, device: torch.device) -> Tensor:
        if self._constants is None or self._constants.device != device:
            beta1, beta2 = self._rule.betas
            rise = float(torch.tensor(1 - beta1, dtype=torch.float32))
            rise = rise if beta1 > 0.5 else rise - 1
            values = (rise, beta2, 1 - beta2, self._rule.eps, self._rule.weight_decay)
            self._constants = _uploaded(torch.tensor(values, dtype=torch.float32), device)
        return self._constants

    def _scalars(self, counters: Sequence[tuple[float, int]]) -> list[tuple[float, float, float]]:
        """The row of each record, computed in double precision as torch does."""
        beta1, beta2 = self._rule.betas
        known = {
            (rate, step): (-(rate / (1 - beta1**step)), sqrt(1 - beta2**step), 1 - rate * self._rule.weight_decay)
            for rate, step in set(counters)
        }
        return [known[counter] for counter in counters]

    def _prepared(self, targets: Sequence[Target]) -> _Tables:
        """The tables of `targets`."""
        device = targets[0].weight.device
        indices = [_index(target.entries, device) for target in targets]
        addresses = [_addresses(target, index) for target, index in zip(targets, indices, strict=True)]
        groups: dict[tuple[str, bool], list[int]] = {}
        for number, target in enumerate(targets):
            is_aligned = all(address % ALIGNMENT == 0 for address in addresses[number])
            groups.setdefault((_form(target.entries), is_aligned), []).append(number)
        rows: list[list[int]] = [[]] * len(targets)
        launches = []
        for (form, is_aligned), members in groups.items():
            tiles = [0]
            for number in members:
                target = targets[number]
                size = prod(target.entries.shape) if form == "bitmap" else target.entries.count
                place = [tiles[-1], size, target.entries.width, self._key(target.parameter), target.start]
                rows[number] = [*addresses[number], *place]
                tiles.append(tiles[-1] + -(-size // self._block))
            if tiles[-1] == 0:
                continue
            numbers = torch.tensor(members, dtype=torch.int32).to(device)
            owners = numbers.repeat_interleave(torch.tensor(tiles).diff().to(device), output_size=tiles[-1])
            ranks = [_ranks(targets[number].entries, self._block) for number in members] if form == "bitmap" else []
            launches.append(_Launch(form, is_aligned, owners, torch.cat(ranks) if ranks else None))
        # No hold on the targets' own indices: they must be free once training of an entry stops.
        made = [index for index, target in zip(indices, targets, strict=True) if index is not target.entries.index]
        return _Tables(
            tuple(weakref.ref(target) for target in targets),
            sum(target.entries.count for target in targets),
            _uploaded(torch.tensor(rows, dtype=torch.int64), device),
            tuple(launches),
            tuple(index for index in made if index is not None),
        )

    def _key(self, parameter: str) -> int:
        digest = hashlib.blake2b(f"{self._seed}/{parameter}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


def _form(entries: Entries) -> str:
    """In which of the kernel's ways the entries are named."""
    if entries.is_all:
        return "all"
    if entries.unit == "row":
        return "rows"
    return "list" if entries.form == "int32" else "bitmap"


def _index(entries: Entries, device: torch.device) -> Tensor | None:
    """What names the entries for the kernel: their index, but for rows always their numbers, int32."""
    if entries.unit == "row" and entries.form == "bitmap":
        return entries.units(device).int()
    return entries.index


def _addresses(target: Target, index: Tensor | None) -> list[int]:
    """Of weight, moments, master copy and index; 0 for none.

    Raises:
        ValueError: a tensor is not contiguous.
    """
    tensors = (target.weight, *target.slots, target.master, index)
    if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"a tensor of {target.parameter} is not contiguous")
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _ranks(entries: Entries, block: int) -> Tensor:
    """How many entries are kept before each tile of `block` positions; int32 (tiles,), on the bitmap's device."""
    assert entries.index is not None
    # The bits of each byte are counted in place of the byte: pairs, then quarters, then halves are added.
    counts = entries.index - ((entries.index >> 1) & 0x55)
    counts = (counts & 0x33) + ((counts >> 2) & 0x33)
    counts = (counts + (counts >> 4)) & 0x0F
    tiles = -(-prod(entries.shape) // block)
    counts = torch.nn.functional.pad(counts, (0, tiles * block // 8 - counts.numel()))
    sums = counts.view(tiles, -1).sum(1, dtype=torch.int32)
    return sums.cumsum(0, dtype=torch.int32) - sums


def _uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` for which the host does not wait."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
