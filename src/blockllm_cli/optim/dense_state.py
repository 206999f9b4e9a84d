"""The state of a dense rule over named tensors: every weight has its own, from the start to the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from blockllm_cli.errors import InputError
from blockllm_cli.footprint import Category, TensorPlan
from blockllm_cli.optim.entries import Entries
from blockllm_cli.optim.precision import Precision
from blockllm_cli.optim.rules import DenseRule
from blockllm_cli.optim.slices import Stored
from blockllm_cli.optim.stored import StoredRule
from blockllm_cli.optim.triton_adam import Target, TritonAdam, triton_adam

MASTER = "master"
STEP = "step"


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
        self._seed = seed
        self._stored_rule = StoredRule(rule, precision, seed)
        self._triton: TritonAdam | None = None
        self._targets: dict[str, Target] = {}
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
            slots, entries = tuple(self._slots[name].values()), Entries.all(tuple(weight.shape))
            self._targets[name] = Target(name, 0, self._weights[name], entries, slots, self._masters.get(name))
        self._triton = triton_adam(self._rule, self._precision, self._seed, self._weights.values())

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
        if self._triton is not None:
            targets, counters = (
                [self._targets[name] for name in gradients],
                [(rate_of(n), self._step) for n in gradients],
            )
            values = list(gradients.values())
            return self._triton.update(targets, values, counters, self._step, count_unchanged=count_unchanged)
        by_rate: dict[float, list[str]] = {}
        for name in gradients:
            by_rate.setdefault(rate_of(name), []).append(name)
        changed: list[Tensor] = []
        for rate, names in by_rate.items():
            stored = [self._stored(name, gradients[name]) for name in names]
            changed += self._stored_rule.apply(
                stored, lr=rate, step=self._step, draw=self._step, count_unchanged=count_unchanged
            )
        if not changed:
            return None
        return 1.0 - torch.stack(changed).sum() / sum(self._weights[name].numel() for name in gradients)

    def _stored(self, name: str, gradient: Tensor) -> Stored:
        master = self._masters.get(name)
        return Stored(
            name,
            self._weights[name].view(-1),
            gradient.reshape(-1),
            tuple(self._slots[name][slot].view(-1) for slot in self._rule.slots),
            None if master is None else master.view(-1),
        )

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
