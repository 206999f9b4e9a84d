"""A rule applied to stored tensors: the one place where its results are written into weights and state.

All arithmetic is fp32 unless weights, gradients and state are all bf16 and are meant to be (`bf16_papers`). What is
stored in bf16 is widened in slices, updated, and rounded back once; of masked pieces the kept entries are gathered,
updated and scattered back in the same slices. All slices share one workspace, small enough to stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockllm_cli.optim.precision import Precision
from blockllm_cli.optim.rounding import StochasticRounder
from blockllm_cli.optim.rules import DenseRule
from blockllm_cli.optim.scratch import Scratch, widened
from blockllm_cli.optim.slices import Part, Stored, groups

SLICE_ENTRIES = 2**18
"""Entries that are worked on at a time on the CPU: 1 MiB for each tensor that is widened or gathered."""

DEVICE_SLICE_ENTRIES = 2**21
"""The same elsewhere, where starting a kernel costs more than reading memory again."""


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
        self._rounders: dict[str, StochasticRounder] = {}
        if precision.rounding == "stochastic":
            self._rounders = {what: StochasticRounder(seed) for what in ("weight", *rule.slots)}

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
            How many entries changed, a scalar for each part that was compared. None is with a master copy, since no
            update is lost then, or where weights are fp32.
        """
        if not stored:
            return []
        counts = count_unchanged and self._precision.weights == torch.bfloat16 and not self._precision.has_master
        dtype = self._dtype(stored)
        direct = [each.whole() for each in stored if not counts and each.is_all_of(dtype)]
        if direct:
            self._compute(direct, dtype, Scratch(0, direct[0].weight.device), lr, step)
        changed: list[Tensor] = []
        # Torch's own bf16 arithmetic (SGD) rounds otherwise at the ends of threads' shares: there are few cuts, since
        # whether an update is counted must not show.
        for_themselves = [each for each in stored if counts and each.is_all_of(dtype)]
        if for_themselves:
            scratch = Scratch(0, for_themselves[0].weight.device)
            changed += self._sliced(for_themselves, DEVICE_SLICE_ENTRIES, dtype, scratch, lr, step, draw, counts=True)
        others = [each for each in stored if not each.is_all_of(dtype)]
        if others:
            most, scratch = self._workspace(others)
            changed += self._sliced(others, most, dtype, scratch, lr, step, draw, counts=counts)
        return changed

    def _sliced(
        self,
        stored: Sequence[Stored],
        most: int,
        dtype: torch.dtype,
        scratch: Scratch,
        lr: float,
        step: int,
        draw: int,
        *,
        counts: bool,
    ) -> list[Tensor]:
        """Apply the rule to `most` entries at a time; how many changed of each part, if it `counts`."""
        changed: list[Tensor] = []
        for group in groups(stored, most):
            scratch.clear()
            former = [part.copy_weights(scratch, "former") for part in group] if counts else []
            work, slots = self._compute(group, dtype, scratch, lr, step)
            for index, part in enumerate(group):
                self._write(part, work[index], [each[index] for each in slots], draw, scratch)
            changed += [
                _count_changed(old, part.weights(scratch, "now")) for old, part in zip(former, group, strict=False)
            ]
        return changed

    @staticmethod
    def _workspace(stored: Sequence[Stored]) -> tuple[int, Scratch]:
        """Entries of a slice of `stored`, and what it is worked on in, for one update: none is kept between them."""
        device = stored[0].weight.device
        most = SLICE_ENTRIES if device.type == "cpu" else DEVICE_SLICE_ENTRIES
        return most, Scratch(min(most, sum(each.gradient.numel() for each in stored)), device)

    def _dtype(self, stored: Sequence[Stored]) -> torch.dtype:
        """What the rule computes in: bf16 if that is meant and everything is stored in it, else fp32."""
        dtypes = {tensor.dtype for each in stored for tensor in (each.weight, each.gradient, *each.slots)}
        is_bf16 = self._precision.name == "bf16_papers" and dtypes == {torch.bfloat16} and not self._rounders
        return torch.bfloat16 if is_bf16 else torch.float32

    def _compute(
        self, parts: Sequence[Part], dtype: torch.dtype, scratch: Scratch, lr: float, step: int
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Run the rule on `parts`; gives their new weights and slots, in place where they are stored in `dtype`."""
        work = [
            widened(part.weights(scratch, "gathered"), dtype, scratch, "weight") if part.master is None else part.master
            for part in parts
        ]
        gradients = [widened(part.gradient, dtype, scratch, "gradient") for part in parts]
        slots = [
            [widened(part.slots[index], dtype, scratch, slot) for part in parts]
            for index, slot in enumerate(self.rule.slots)
        ]
        self.rule.apply(work, gradients, slots, step=step, lr=lr)
        return work, slots

    def _write(self, part: Part, weight: Tensor, slots: Sequence[Tensor], draw: int, scratch: Scratch) -> None:
        """Store what `_compute` gave for `part`, rounding as the run asks."""
        for what, target, new in zip(self.rule.slots, part.slots, slots, strict=True):
            if target is not new:
                self._round(part, what, target, new, draw, scratch)
        if part.chunk is None:
            if part.weight is not weight:
                self._round(part, "weight", part.weight, weight, draw, scratch)
        elif part.weight.dtype == weight.dtype:
            part.chunk.scatter_(part.weight, weight)
        else:
            rounded = scratch.take("rounded", part.size, part.weight.dtype)
            self._round(part, "weight", rounded, weight, draw, scratch)
            part.chunk.scatter_(part.weight, rounded)

    def _round(self, part: Part, what: str, target: Tensor, source: Tensor, draw: int, scratch: Scratch) -> None:
        rounder = self._rounders.get(what)
        if rounder is None or target.dtype == torch.float32:
            target.copy_(source)
            return
        if source is part.master:
            source = scratch.take("weight", part.size, source.dtype).copy_(source)
        rounder.write(target, source, f"{part.name}/{what}/{draw}", part.start, scratch)


def _count_changed(old: Tensor, new: Tensor) -> Tensor:
    """How many entries of two bf16 tensors differ; by their bits, which is five times faster than by value.

    `old` is used up.
    """
    return torch.count_nonzero(old.view(torch.int16).bitwise_xor_(new.view(torch.int16)))
