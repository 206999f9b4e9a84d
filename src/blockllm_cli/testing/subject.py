"""What a check is given: a method class with options, ready to be tried on a tiny Llama, and how a check fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blockllm_cli.errors import RecipeError
from blockllm_cli.methods.base import Method, Rates, Setting
from blockllm_cli.methods.resolve import nearest_hyperparameters
from blockllm_cli.model.llama import LlamaForCausalLM
from blockllm_cli.model.roles import DENSE_ROLES, role_of
from blockllm_cli.optim.precision import PrecisionName, Rounding, precision_of
from blockllm_cli.recipe.kinds import literal
from blockllm_cli.recipe.load import check_table
from blockllm_cli.recipe.origins import ABSENT, Origin, Problem, describe, joined
from blockllm_cli.testing.driver import Asked, Driven, ask_update, drive_update
from blockllm_cli.testing.tiny import tiny_batch, tiny_config, tiny_llama

PRECISIONS: tuple[PrecisionName, ...] = ("fp32", "bf16", "bf16_master", "bf16_papers")
SEED = 5
BATCHES = 8
"""How many different batches a long trial goes through, again and again."""


class ContractError(AssertionError):
    """A method does not keep a promise of the contract; the text names method, tensor, numbers and promise."""


class NotApplicableError(Exception):
    """The promise is none that this method, with these options, makes; the text says why."""


@dataclass(frozen=True)
class Subject:
    """A method class with the options under which it is checked.

    Attributes:
        kind: the class.
        options: values of its `Options`; what is absent has its default.
        label: tells these options from others of the same run, or empty.
    """

    kind: type[Method]
    options: Mapping[str, Any]
    label: str = ""

    def __str__(self) -> str:
        given = ", ".join(f"{key} = {literal(value)}" for key, value in self.options.items())
        return f"{self.kind.name} ({given})" if given else self.kind.name

    def broken(self, what: str, promise: str) -> ContractError:
        """The failure of a check: what was seen, and the promise that it breaks."""
        return ContractError(f"{self}: {what}. The contract: {promise}.")

    @property
    def updates(self) -> int:
        """Updates until every trained tensor has moved, by the method's own word."""
        return self.kind.facts.cycle.updates

    @property
    def is_cycle(self) -> bool:
        """Whether that word is given for these options."""
        return self.kind.facts.cycle.options.keys() <= self.options.keys()

    @property
    def rates(self) -> Rates:
        """Peak rates that the method publishes for the size that is nearest to the tiny model."""
        published = nearest_hyperparameters(self.kind.facts, tiny_config())[1]
        body = published.learning_rate
        return Rates(body, body if published.dense_rate is None else published.dense_rate)

    def paces(self) -> list[Rates]:
        """Rates to try one after the other where a check needs weights to go somewhere: tiny models want high ones."""
        return [scaled(self.rates, factor) for factor in (10.0, 100.0, 1000.0, 1.0)]

    def has_option(self, key: str) -> bool:
        """Whether there is such an option, and the caller has not fixed it."""
        return key in self.kind.Options.model_fields and key not in self.options

    def with_options(self, **options: Any) -> Subject:
        """The same with other options beside its own."""
        return replace(self, options={**self.options, **options})

    def method(
        self,
        precision: PrecisionName = "fp32",
        *,
        rounding: Rounding = "nearest",
        micro_batches: int = 1,
        layerwise_allowed: bool = True,
        **options: Any,
    ) -> Method:
        """The method with nothing allocated; `options` are put beside those of the subject."""
        setting = Setting(SEED, precision_of(precision, rounding), micro_batches, self.rates, layerwise_allowed)
        return self.kind(self.kind.Options(**{**self.options, **options}), setting)

    def trial(
        self,
        precision: PrecisionName = "fp32",
        *,
        rounding: Rounding = "nearest",
        micro_batches: int = 1,
        layerwise_allowed: bool = True,
        tied: bool = False,
        **options: Any,
    ) -> Trial:
        """A fresh model and the method prepared with it."""
        method = self.method(
            precision, rounding=rounding, micro_batches=micro_batches, layerwise_allowed=layerwise_allowed, **options
        )
        model = tiny_llama(torch.float32 if precision == "fp32" else torch.bfloat16, tied=tied)
        method.prepare(model)
        return Trial(method, model, micro_batches)

    def trained(self, *, tied: bool = False) -> set[str]:
        """Names of the parameters that the method says it writes."""
        method = self.method()
        return {name for name in tiny_config(tied=tied).parameter_shapes() if method.trains(name)}


@dataclass
class Trial:
    """A method at work on a model of its own."""

    method: Method
    model: LlamaForCausalLM
    micro_batches: int = 1

    def update(self, step: int, rates: Rates, **keywords: Any) -> Driven:
        """One update at `rates` times the method's own factor, as the trainer has it; keywords of `drive_update`."""
        rates = scaled(rates, self.method.rate_factor(step))
        return drive_update(self.method, self.model, step, rates, micro_batches=self.micro_batches, **keywords)

    def ask(self, step: int, rates: Rates, **keywords: Any) -> Asked:
        """An update up to the moment before anything is written; keywords of `ask_update`."""
        rates = scaled(rates, self.method.rate_factor(step))
        return ask_update(self.method, self.model, step, rates, micro_batches=self.micro_batches, **keywords)

    def run(self, steps: Iterable[int], rates: Rates, **keywords: Any) -> list[Driven]:
        """Updates one after the other."""
        return [self.update(step, rates, **keywords) for step in steps]

    def weights(self) -> dict[str, Tensor]:
        """Copies of the weights that an evaluation would see."""
        return {name: value.detach().clone() for name, value in self.method.merged_weights(self.model).items()}


def checked(kind: type[Method], options: Mapping[str, Any], label: str = "") -> Subject:
    """A subject, if its options are valid.

    Raises:
        RecipeError: an option is unknown, or its value is none that it may have.
    """
    found, problems = check_table("method", kind.Options, dict(options))
    if found is None:
        lines = [describe(problem, Origin(f"options of {kind.name}"), _given(problem, options)) for problem in problems]
        raise RecipeError(joined(lines))
    return Subject(kind, options, label)


def _given(problem: Problem, options: Mapping[str, Any]) -> Any:
    return options.get(problem.key.removeprefix("method."), ABSENT)


def scaled(rates: Rates, factor: float) -> Rates:
    """Both rates times `factor`."""
    return Rates(rates.body * factor, rates.dense * factor)


def of_few_batches(step: int, rows: slice) -> Any:
    """`tiny_batch` from a small set, so that a loss can fall in few updates."""
    return tiny_batch(step % BATCHES, rows)


def is_dense(name: str) -> bool:
    """Whether the dense rate is that of the parameter `name`."""
    return role_of(name) in DENSE_ROLES


Check = Callable[[Subject], None]
"""A check raises `ContractError` or `NotApplicableError`; the first line of its docstring is its title."""
