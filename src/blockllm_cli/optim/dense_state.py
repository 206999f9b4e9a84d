"""The state of a dense rule over named tensors, and the one place where its results are written into weights.

All arithmetic is fp32 unless weights, gradients and state are all bf16 and are meant to be (`bf16_papers`). What is
stored in bf16 is widened in slices of bounded size, updated, and rounded back once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blockllm_cli.errors import InputError
from blockllm_cli.footprint import Category, TensorPlan
from blockllm_cli.optim.precision import Precision
from blockllm_cli.optim.rounding import StochasticRounder
from blockllm_cli.optim.rules import DenseRule

SLICE_ENTRIES = 2**21
"""Entries that are widened to fp32 at a time: 8 MiB for each of weight, gradient and state."""

MASTER = "master"
STEP = "step"


class _Slice(NamedTuple):
    """Entries `start` to `stop` of a tensor in row-major order."""

    name: str
    start: int
    stop: int


class DenseState:
    """State tensors, fp32 master copies and the step counter of one rule over named weights.

    Saved are `<name>.<slot>`, `<name>.master` and `step`, the number of updates so far; nothing is derived.

    Args:
        rule: what is done to each entry.
        precision: dtypes of weights, state and accumulated gradients, and the rounding of bf16 writes. Stochastic
            rounding applies to bf16 state as well as to weights.
        seed: of stochastic rounding; draws are keyed by (seed, name, step).
    """

    def __init__(self, rule: DenseRule, precision: Precision, seed: int) -> None:
        self._rule = rule
        self._precision = precision
        self._rounder = StochasticRounder(seed) if precision.rounding == "stochastic" else None
        self._weights: dict[str, Tensor] = {}
        self._slots: dict[str, dict[str, Tensor]] = {}
        self._masters: dict[str, Tensor] = {}
        self._step = 0

    def plan(self, shapes: Mapping[str, tuple[int, ...]]) -> list[TensorPlan]:
        """The tensors that `allocate` would make for weights of `shapes`."""
        moments = str(self._precision.moments).removeprefix("torch.")
        plans = [
            TensorPlan(f"{name}.{slot}", "optimizer_state", shape, moments)
            for name, shape in shapes.items()
            for slot in self._rule.slots
        ]
        if self._precision.has_master:
            plans += [
                TensorPlan(f"{name}.{MASTER}", "master_weights", shape, "float32") for name, shape in shapes.items()
            ]
        return plans

    def allocate(self, weights: Mapping[str, Tensor]) -> None:
        """Take hold of `weights`, which `update` will write, and make their state: zeros, and copies of the weights.

        Raises:
            ValueError: a weight is not contiguous, or not of the precision's dtype.
        """
        for name, weight in weights.items():
            if weight.dtype != self._precision.weights or not weight.is_contiguous():
                raise ValueError(f"{name} is {weight.dtype} with strides {weight.stride()}: not what the state is for")
            self._weights[name] = weight.detach()
            self._slots[name] = {
                slot: torch.zeros_like(self._weights[name], dtype=self._precision.moments) for slot in self._rule.slots
            }
            if self._precision.has_master:
                self._masters[name] = self._weights[name].to(torch.float32, copy=True)

    @torch.no_grad()
    def update(
        self, gradients: Mapping[str, Tensor], rate_of: Callable[[str], float], *, count_unchanged: bool = False
    ) -> Tensor | None:
        """Apply the rule once to every weight that has a gradient.

        Args:
            gradients: name -> gradient in the weight's shape; may be overwritten. A weight without one keeps its value
                and its moments, but the step counter is common to all.
            rate_of: learning rate of each name.
            count_unchanged: compare bf16 weights with their former values.

        Returns:
            Share of the weights' entries that kept their value, a scalar on their device, if it was asked for
            and a bf16 weight is all there is of it (with a master copy no update is lost); else None.
        """
        self._step += 1
        widen = not self._is_direct(gradients)
        by_rate: dict[float, list[str]] = {}
        for name in gradients:
            by_rate.setdefault(rate_of(name), []).append(name)
        counts = count_unchanged and self._precision.weights == torch.bfloat16 and not self._precision.has_master
        changed: list[Tensor] = []
        for rate, names in by_rate.items():
            for group in self._groups(names, whole=not widen and not counts):
                former = [weight.clone() for weight in self._cut(self._weights, group)] if counts else []
                self._update_group(group, gradients, rate, widen=widen)
                now = self._cut(self._weights, group) if counts else []
                changed += [_count_changed(old, new) for old, new in zip(former, now, strict=True)]
        if not changed:
            return None
        return 1.0 - torch.stack(changed).sum() / sum(self._weights[name].numel() for name in gradients)

    def _is_direct(self, gradients: Mapping[str, Tensor]) -> bool:
        """Whether the rule can run on the stored tensors themselves, so that nothing has to be cut."""
        precision = self._precision
        stored = {precision.weights, *(gradient.dtype for gradient in gradients.values())}
        if self._rule.slots:
            stored.add(precision.moments)
        if stored == {torch.float32}:
            return True
        return precision.name == "bf16_papers" and stored == {torch.bfloat16} and self._rounder is None

    def _groups(self, names: Iterable[str], *, whole: bool) -> Iterator[list[_Slice]]:
        """Cut the tensors so that a group has at most `SLICE_ENTRIES` entries; one group of whole tensors if `whole`.

        Cuts are at multiples of `SLICE_ENTRIES` within a tensor, so that neither vector units nor draws see them.
        """
        group: list[_Slice] = []
        entries = 0
        for name in names:
            size = self._weights[name].numel()
            for start in range(0, size, size if whole else SLICE_ENTRIES):
                stop = size if whole else min(start + SLICE_ENTRIES, size)
                if group and not whole and entries + stop - start > SLICE_ENTRIES:
                    yield group
                    group, entries = [], 0
                group.append(_Slice(name, start, stop))
                entries += stop - start
        if group:
            yield group

    def _update_group(
        self, group: Sequence[_Slice], gradients: Mapping[str, Tensor], rate: float, *, widen: bool
    ) -> None:
        weights = self._cut(self._weights, group)
        slots = [
            self._cut({part.name: self._slots[part.name][slot] for part in group}, group) for slot in self._rule.slots
        ]
        grads = self._cut(gradients, group)
        work = self._cut(self._masters, group) if self._masters else _fp32(weights) if widen else weights
        work_slots = [_fp32(slot) for slot in slots] if widen else slots
        self._rule.apply(work, _fp32(grads) if widen else grads, work_slots, step=self._step, lr=rate)
        for name, stored, new in zip(self._rule.slots, slots, work_slots, strict=True):
            self._write(stored, new, group, name)
        self._write(weights, work, group, "weight", keep=bool(self._masters))

    def _write(
        self, stored: Sequence[Tensor], new: Sequence[Tensor], group: Sequence[_Slice], what: str, *, keep: bool = False
    ) -> None:
        """Put `new` into `stored`, rounding as the run asks; `new` is used up unless `keep`."""
        for target, source, part in zip(stored, new, group, strict=True):
            if target is source:
                continue
            if self._rounder is None:
                target.copy_(source)
            else:
                key = f"{part.name}/{what}/{self._step}/{part.start}"
                self._rounder.write(target, source.clone() if keep else source, key)

    @staticmethod
    def _cut(tensors: Mapping[str, Tensor], group: Sequence[_Slice]) -> list[Tensor]:
        return [tensors[part.name].reshape(-1)[part.start : part.stop] for part in group]

    def state_dict(self) -> dict[str, Any]:
        """All state under its saved names; the tensors are the live ones, not copies."""
        return {STEP: self._step, **{name: tensor for name, _, tensor in self.held()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy `state` into the allocated tensors, one at a time.

        Raises:
            InputError: a tensor is missing, unexpected, or of another shape or dtype. The state may be
                partly overwritten then and is of no further use.
        """
        mine = self.state_dict()
        missing = sorted(mine.keys() - state.keys())
        extra = sorted(state.keys() - mine.keys())
        if missing or extra:
            what = f"has no {missing[0]!r}" if missing else f"has {extra[0]!r}, which this method does not hold"
            raise InputError(f"the optimizer state to load {what} ({len(missing)} missing, {len(extra)} unexpected)")
        step = state[STEP]
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise InputError(f"the optimizer state to load has step = {step!r}; a count of updates is wanted")
        del mine[STEP]
        for name, tensor in mine.items():
            saved = state[name]
            if not isinstance(saved, Tensor) or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                there = f"{tuple(saved.shape)} {saved.dtype}" if isinstance(saved, Tensor) else repr(saved)
                raise InputError(
                    f"{name}: the state to load is {there}, the run needs {tuple(tensor.shape)} {tensor.dtype}"
                )
            tensor.copy_(saved)
        self._step = step

    def held(self) -> Iterator[tuple[str, Category, Tensor]]:
        """Every tensor of the state with its saved name and category, each once."""
        for name, slots in self._slots.items():
            for slot, tensor in slots.items():
                yield f"{name}.{slot}", "optimizer_state", tensor
        for name, tensor in self._masters.items():
            yield f"{name}.{MASTER}", "master_weights", tensor

    @property
    def first_moment_entries(self) -> int:
        """Elements of the first state tensor of every weight; 0 for a rule without state."""
        first = self._rule.slots[:1]
        return sum(slots[slot].numel() for slots in self._slots.values() for slot in first)

    @property
    def entries(self) -> int:
        """Elements of all weights."""
        return sum(weight.numel() for weight in self._weights.values())


def _fp32(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in fp32; those that are fp32 already are not copied."""
    return [tensor.float() for tensor in tensors]


def _count_changed(old: Tensor, new: Tensor) -> Tensor:
    """How many entries of two bf16 tensors differ; by their bits, which is five times faster than by value."""
    return torch.count_nonzero(old.view(torch.int16) ^ new.view(torch.int16))
