"""A rule applied to stored tensors: the one place where its results are written into weights and state.

All arithmetic is fp32 unless weights, gradients and state are all bf16 and are meant to be (`bf16_papers`). What is
stored in bf16 is widened in slices of bounded size, updated, and rounded back once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blockllm_cli.optim.precision import Precision
from blockllm_cli.optim.rounding import StochasticRounder
from blockllm_cli.optim.rules import DenseRule

SLICE_ENTRIES = 2**21
"""Entries that are widened to fp32 at a time: 8 MiB for each of weight, gradient and state."""


class Stored(NamedTuple):
    """What a rule works on for one name; all tensors are 1-D, of one length and device.

    Attributes:
        name: names the draws of stochastic rounding.
        weight: written.
        gradient: may be overwritten.
        slots: state, one tensor for each of the rule's slots; written.
        master: fp32 copy of the weight, which is what the rule works on then; written.
    """

    name: str
    weight: Tensor
    gradient: Tensor
    slots: tuple[Tensor, ...]
    master: Tensor | None

    def cut(self, start: int, stop: int) -> Stored:
        """The entries from `start` to before `stop`, views."""
        return Stored(
            self.name,
            self.weight[start:stop],
            self.gradient[start:stop],
            tuple(slot[start:stop] for slot in self.slots),
            None if self.master is None else self.master[start:stop],
        )


class StoredRule:
    """Applies `rule` in the dtypes and with the rounding of `precision`.

    Args:
        rule: what is done to each entry.
        precision: dtypes and the rounding of bf16 writes; stochastic rounding applies to bf16 state as well.
        seed: of stochastic rounding; draws are keyed by (seed, name, update).
    """

    def __init__(self, rule: DenseRule, precision: Precision, seed: int) -> None:
        self.rule = rule
        self._precision = precision
        self._rounder = StochasticRounder(seed) if precision.rounding == "stochastic" else None

    @torch.no_grad()
    def apply(
        self, stored: Sequence[Stored], *, lr: float, step: int, draw: int, count_unchanged: bool = False
    ) -> list[Tensor]:
        """Apply the rule once, in place.

        Args:
            stored: what it is applied to; all with the same step.
            lr: learning rate.
            step: number of this update since the state was zero, from 1.
            draw: names the update in the keys of stochastic rounding.
            count_unchanged: compare bf16 weights with their former values.

        Returns:
            How many entries changed, a scalar for each slice that was compared. None is with a master copy, since no
            update is lost then, or where weights are fp32.
        """
        widen = not self._is_direct(stored)
        counts = count_unchanged and self._precision.weights == torch.bfloat16 and not self._precision.has_master
        changed: list[Tensor] = []
        for group in _groups(stored, whole=not widen and not counts):
            former = [part.weight.clone() for part, _ in group] if counts else []
            self._apply_group(group, lr, step, draw, widen=widen)
            changed += [_count_changed(old, part.weight) for old, (part, _) in zip(former, group, strict=False)]
        return changed

    def _is_direct(self, stored: Sequence[Stored]) -> bool:
        """Whether the rule can run on the stored tensors themselves, so that nothing has to be cut."""
        precision = self._precision
        dtypes = {precision.weights, *(each.gradient.dtype for each in stored)}
        if self.rule.slots:
            dtypes.add(precision.moments)
        if dtypes == {torch.float32}:
            return True
        return precision.name == "bf16_papers" and dtypes == {torch.bfloat16} and self._rounder is None

    def _apply_group(
        self, group: Sequence[tuple[Stored, int]], lr: float, step: int, draw: int, *, widen: bool
    ) -> None:
        parts = [part for part, _ in group]
        work = [part.weight if part.master is None else part.master for part in parts]
        gradients = [part.gradient for part in parts]
        slots = [[part.slots[index] for part in parts] for index in range(len(self.rule.slots))]
        if widen:
            work, gradients, slots = _fp32(work), _fp32(gradients), [_fp32(slot) for slot in slots]
        self.rule.apply(work, gradients, slots, step=step, lr=lr)
        for index, slot in enumerate(self.rule.slots):
            for (part, start), new in zip(group, slots[index], strict=True):
                self._write(part.slots[index], new, f"{part.name}/{slot}/{draw}/{start}")
        for (part, start), new in zip(group, work, strict=True):
            self._write(part.weight, new, f"{part.name}/weight/{draw}/{start}", keep=part.master is not None)

    def _write(self, target: Tensor, source: Tensor, key: str, *, keep: bool = False) -> None:
        """Put `source` into `target`, rounding as the run asks; `source` is used up unless `keep`."""
        if target is source:
            return
        if self._rounder is None or target.dtype == torch.float32:
            target.copy_(source)
        else:
            self._rounder.write(target, source.clone() if keep else source, key)


def _groups(stored: Sequence[Stored], *, whole: bool) -> Iterator[list[tuple[Stored, int]]]:
    """Cut so that a group has at most `SLICE_ENTRIES` entries, each part with its start; one group if `whole`.

    Cuts are at multiples of `SLICE_ENTRIES` within a tensor, so that neither vector units nor draws see them.
    """
    if whole:
        if stored:
            yield [(each, 0) for each in stored]
        return
    group: list[tuple[Stored, int]] = []
    entries = 0
    for each in stored:
        size = each.weight.numel()
        for start in range(0, size, SLICE_ENTRIES):
            stop = min(start + SLICE_ENTRIES, size)
            if group and entries + stop - start > SLICE_ENTRIES:
                yield group
                group, entries = [], 0
            group.append((each.cut(start, stop), start))
            entries += stop - start
    if group:
        yield group


def _fp32(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in fp32; those that are fp32 already are not copied."""
    return [tensor.float() for tensor in tensors]


def _count_changed(old: Tensor, new: Tensor) -> Tensor:
    """How many entries of two bf16 tensors differ; by their bits, which is five times faster than by value."""
    return torch.count_nonzero(old.view(torch.int16) ^ new.view(torch.int16))
