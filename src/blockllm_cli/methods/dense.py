"""What the methods share that keep the whole gradient of every parameter they train. Not a method itself.

A subclass says which rule it uses, and which parameters it trains; routes, state, plan and checkpoints follow.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from blockllm_cli.footprint import TensorPlan
from blockllm_cli.gradients.routes import Dense
from blockllm_cli.methods.base import (
    Backward,
    Event,
    Held,
    Method,
    MethodOptions,
    PassResult,
    Rates,
    Setting,
    StateDtype,
)
from blockllm_cli.optim.dense_state import DenseState
from blockllm_cli.optim.rules import DenseRule

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class DenseOptions(MethodOptions):
    """Options of every dense method."""

    state_dtype: StateDtype | None = Field(
        default=None,
        description="Element type of the state tensors: fp32 or bf16. Absent: as run.precision says.",
    )


class AdamOptions(DenseOptions):
    """Options of a method whose rule is a form of Adam."""

    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.999), description="Decay rates of the first and the second moment, each in [0, 1)."
    )
    eps: float = Field(
        default=1e-8, gt=0.0, description="Added to the root of the bias-corrected second moment; above 0."
    )


class DenseMethod(Method):
    """Trains whole parameters, each with its full gradient and one dense rule.

    State: see `DenseState`; nothing else is saved.
    """

    def __init__(self, options: Any, setting: Setting) -> None:
        precision = setting.precision.with_moments(options.state_dtype)
        self._options = options
        self._accumulator = precision.accumulator(setting.micro_batches)
        self._state = DenseState(self._rule(options), precision, setting.seed)
        self._names: list[str] = []

    @staticmethod
    @abstractmethod
    def _rule(options: Any) -> DenseRule:
        """The rule that `options` describe."""

    def plan(self, shapes: Mapping[str, tuple[int, ...]]) -> list[TensorPlan]:
        """Full gradients for the length of an update, then the state. See `Method.plan`.

        With a single micro-batch and an equal dtype, the gradient that autograd made is itself the accumulator.
        """
        trained = {name: shape for name, shape in shapes.items() if self.trains(name)}
        dtype = str(self._accumulator).removeprefix("torch.")
        gradients = [TensorPlan(name, "gradients", shape, dtype, "update") for name, shape in trained.items()]
        return gradients + self._state.plan(trained)

    def prepare(self, model: nn.Module) -> None:
        """Allocate the state of the trained parameters. See `Method.prepare`."""
        trained = {name: parameter for name, parameter in model.named_parameters() if self.trains(name)}
        self._names = list(trained)
        self._state.allocate(trained)

    def passes(self, step: int, rates: Rates) -> Generator[Backward, PassResult, None]:
        """One backward pass, dense routes for all that is trained."""
        yield Backward({name: Dense(self._accumulator) for name in self._names})

    def update(
        self,
        step: int,
        rates: Rates,
        chosen: Mapping[str, Tensor],
        loss: float,
        *,
        count_unchanged: bool = False,
    ) -> list[Event]:
        """Apply the rule to each parameter at the rate of its role. See `Method.update`."""
        self._unchanged = self._state.update(chosen, rates.of, count_unchanged=count_unchanged)
        return []

    def state_dict(self) -> dict[str, Any]:
        """State tensors by parameter name, and `step`. See `Method.state_dict`."""
        return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Method.load_state_dict`."""
        self._state.load_state_dict(state)

    def held(self) -> Iterator[Held]:
        """State and master copies."""
        for name, category, tensor in self._state.held():
            yield Held(name, category, tensor)

    @property
    def state_entries(self) -> int:
        """Elements of first moments (or of momentum buffers)."""
        return self._state.first_moment_entries

    @property
    def trainable_entries(self) -> int:
        """Elements of all trained parameters."""
        return self._state.entries
