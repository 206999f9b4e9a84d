"""Checks of the plan: real bytes against planned ones, at every moment at which a run counts them."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockllm_cli.footprint import Category, TensorPlan, bytes_by_category
from blockllm_cli.gradients.engine import routed
from blockllm_cli.gradients.routes import Route
from blockllm_cli.memory.measure import storage_bytes
from blockllm_cli.model.llama import LlamaForCausalLM
from blockllm_cli.optim.precision import PrecisionName
from blockllm_cli.testing.subject import PRECISIONS, NotApplicableError, Subject, Trial
from blockllm_cli.testing.tiny import covering_batch, tiny_batch, tiny_config, tiny_llama

SCALARS = 64
"""Bytes for each tensor of the model that a method may keep undeclared: a few numbers, such as a norm."""
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")


def holds_what_it_planned(subject: Subject) -> None:
    """Real bytes never exceed the plan, at any border of any update; they equal it where the plan names tensors."""
    words: list[str | None] = [None, "bf16", "fp32"] if subject.has_option("state_dtype") else [None]
    for precision in PRECISIONS:
        _Books(subject, precision, tied=False, micro_batches=1).keep(subject.updates if precision == "fp32" else 4)
        _Books(subject, precision, tied=True, micro_batches=3).keep(2)
        for word in words[1:]:
            _Books(subject, precision, tied=word == "fp32", micro_batches=1, state_dtype=word).keep(2)


class _Books:
    """The plan of one trial, and the counts that are held against it."""

    def __init__(
        self, subject: Subject, precision: PrecisionName, *, tied: bool, micro_batches: int, **options: Any
    ) -> None:
        self._subject = subject
        shapes = tiny_config(tied=tied).parameter_shapes()
        self._plan = subject.method(precision, micro_batches=micro_batches, **options).plan(shapes)
        self._planned = bytes_by_category(self._plan)
        self._is_exact = all(_names_a_tensor(plan, shapes) for plan in self._plan)
        self._gradients = {plan.name: plan for plan in self._plan if plan.category == "gradients"}
        self.trial: Trial = subject.trial(precision, tied=tied, micro_batches=micro_batches, **options)
        self._setting = f"{precision}, {micro_batches} micro-batches" + "".join(f", {o}" for o in options.values())

    def keep(self, updates: int) -> None:
        self._count_held("after `prepare`")
        for step in range(1, updates + 1):
            self.trial.update(step, self._subject.rates, between=self._count_routes)
            self._count_held(f"after update {step}")

    def _count_routes(self, routes: Mapping[str, Route]) -> None:
        for key, route in routes.items():
            kept = route.result()
            real = 0 if kept is None else storage_bytes([kept])
            if route.held_bytes() < real:
                raise self._subject.broken(
                    f"the route of {key} says it holds {route.held_bytes()} bytes, its result alone has {real} "
                    f"({self._setting})",
                    "`held_bytes` is the truth",
                )
            if self._is_exact and (planned := self._gradients.get(key)) and kept is not None:
                self._equal(key, (kept.untyped_storage().nbytes(), _word(kept)), (planned.bytes, planned.dtype))
        self._at_most("gradients", sum(route.held_bytes() for route in routes.values()), "between micro-batches")
        self._count_held("between micro-batches")

    def _count_held(self, when: str) -> None:
        by_category: dict[Category, list[Tensor]] = {}
        held = list(self.trial.method.held())
        for each in held:
            by_category.setdefault(each.category, []).append(each.tensor)
        for category, tensors in by_category.items():
            self._at_most(category, storage_bytes(tensors), when)
        if not self._is_exact:
            return
        real = {each.name: (each.category, tuple(each.tensor.shape), _word(each.tensor)) for each in held}
        planned = {plan.name: (plan.category, plan.shape, plan.dtype) for plan in self._plan if plan.lifetime == "run"}
        for name in sorted(real.keys() | planned.keys()):
            self._equal(name, real.get(name), planned.get(name))
        counted = sum(storage_bytes(tensors) for tensors in by_category.values())
        self._equal("the sum of all tensors held", counted, sum(p.bytes for p in self._plan if p.lifetime == "run"))

    def _at_most(self, category: Category, count: int, when: str) -> None:
        planned = self._planned.get(category, 0)
        if count > planned:
            raise self._subject.broken(
                f"{category} are {count:,} bytes {when}, {planned:,} were planned ({self._setting})",
                "the plan is an upper bound of each category at every moment",
            )

    def _equal(self, what: str, real: object, planned: object) -> None:
        if real != planned:
            raise self._subject.broken(
                f"{what} is {real}, planned was {planned} ({self._setting})",
                "a plan whose entries carry names of parameters is exact, tensor by tensor; give other names to bounds",
            )


def _names_a_tensor(plan: TensorPlan, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the entry is about a tensor of its own: `<parameter>` or `<parameter>.<state name>`."""
    return plan.name in shapes or plan.name.rpartition(".")[0] in shapes


def _word(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def holds_nothing_else(subject: Subject) -> None:
    """Between updates nothing stays in memory that `held` does not name, however long the run."""
    model = tiny_llama()
    with routed(model, {}):
        model.loss(tiny_batch(1), scale=1.0)  # fills what the model itself keeps
    gc.collect()
    gc.freeze()  # from here on the collector knows of nothing that was there before
    try:
        _hold_nothing_else(subject, model)
    finally:
        gc.unfreeze()


def _hold_nothing_else(subject: Subject, model: LlamaForCausalLM) -> None:
    method = subject.method()
    method.prepare(model)
    trial = Trial(method, model)
    allowed = SCALARS * len(tiny_config().parameter_shapes())
    done = 0
    for updates in (3, max(subject.updates, 10)):
        trial.run(range(done + 1, updates + 1), subject.rates)
        done = updates
        method.state_dict()  # settles what waits to be read by the host
        declared = storage_bytes(each.tensor for each in method.held())
        undeclared = _new_bytes(model) - declared
        if undeclared > allowed:
            raise subject.broken(
                f"after {updates} updates tensors of {undeclared:,} bytes are alive beside the model and the "
                f"{declared:,} bytes that `held` names",
                "`held` names every tensor that is kept between updates, a few numbers excepted",
            )


def _new_bytes(model: LlamaForCausalLM) -> int:
    """Bytes of the tensors that the collector knows of, each storage once; views of weights are none."""
    gc.collect()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    # By the type, not by isinstance, which would ask stand-ins of other libraries for their class.
    found = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and each.device.type != "meta"]
    return storage_bytes(each for each in found if each.untyped_storage().data_ptr() not in weights)


def keeps_state_in_the_dtype_asked_for(subject: Subject) -> None:
    """`state_dtype` decides the dtype of the state in every precision."""
    if not subject.has_option("state_dtype"):
        raise NotApplicableError("there is no option state_dtype to choose")
    for precision in PRECISIONS:
        for word, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            trial = subject.trial(precision, state_dtype=word)
            trial.run((1, 2), subject.rates)
            for each in trial.method.held():
                if each.category == "optimizer_state" and each.tensor.dtype != dtype:
                    raise subject.broken(
                        f'{each.name} is {each.tensor.dtype} with state_dtype = "{word}" in {precision}',
                        "the option decides the dtype of all optimizer state",
                    )


def counts_what_it_trains(subject: Subject) -> None:
    """`state_entries` and `trainable_entries` are the numbers of entries that there are and that move."""
    trial = subject.trial()
    share = 0.0
    for step in range(1, max(subject.updates, 3) + 1):
        before = trial.weights()
        trial.update(step, subject.rates, batch=covering_batch)
        changed = sum(int((value != before[name]).sum()) for name, value in trial.weights().items())
        trainable = trial.method.trainable_entries
        if changed > trainable:
            raise subject.broken(
                f"update {step} changed {changed} entries, `trainable_entries` is {trainable}",
                "it is the number of weights that an update can write",
            )
        share = max(share, changed / trainable if trainable else 0.0)
        _count_first_moments(subject, trial, step)
    if share < 0.98:
        raise subject.broken(
            f"no update changed more than {share:.0%} of `trainable_entries` = {trainable}, although every entry had a "
            "gradient",
            "it is the number of weights that an update can write",
        )


def _count_first_moments(subject: Subject, trial: Trial, step: int) -> None:
    state = [each for each in trial.method.held() if each.category == "optimizer_state"]
    first = [each for each in state if each.name.rpartition(".")[2] in FIRST_MOMENTS]
    entries = sum(each.tensor.numel() for each in first or state)
    told = trial.method.state_entries
    if told != entries if first or not state else not 0 <= told <= entries:
        raise subject.broken(
            f"after update {step}, `state_entries` is {told}; held are {entries} elements of "
            f"{'first moments' if first else 'optimizer state'}",
            "it is the number of elements of first moments",
        )
