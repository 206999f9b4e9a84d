"""The protocol of a training method, and the facts that it states about itself.

A method decides two things: what is kept of each parameter's gradient (its routes), and what rule turns that into an
update. It lives in one file, `methods/<name>.py`, whose class is found by the registry. Its life, in order:

1. `Method(options, setting)`: nothing is allocated; `plan(shapes)` can already be asked.
2. `prepare(model)`: takes hold of the parameters it will write and allocates its state.
3. per update: `passes` yields passes (routes for one backward), `choose` returns the tensors the update will be
   written from (the trainer checks and scales exactly these), `update` writes weights. An update can be given up at
   any moment before `update` is called: until then nothing that a later update depends on may change, but for what
   layer-wise routes write.
4. `state_dict` / `load_state_dict`: everything that steers a later update, as tensors and plain values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from blockllm_cli.footprint import Category, TensorPlan
from blockllm_cli.gradients.routes import Route
from blockllm_cli.model.roles import DENSE_ROLES, role_of
from blockllm_cli.optim.precision import Precision

Event = dict[str, Any]
"""A line of events.jsonl without its step: {"kind": "selection", ...}, plain JSON values only."""


class MethodOptions(BaseModel):
    """Base of the typed `[method]` table: unknown keys are refused, values are frozen.

    Every field carries a description with its unit and range. `name` and `seed` belong to every method and are not
    fields here; a method that has variants has a field `variant`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


@dataclass(frozen=True)
class Hyperparameters:
    """Values used for what a recipe leaves out, for one model size.

    Attributes:
        learning_rate: peak rate of the body (and of everything, if `dense_rate` is None).
        dense_rate: peak rate of embedding, head and norms.
        clip: limit of the kept norm; 0 is off.
        options: values of the method's own options.
        source: where they are published, or "ours" where nothing is.
    """

    learning_rate: float
    dense_rate: float | None = None
    clip: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    source: str = "ours"


@dataclass(frozen=True)
class Cycle:
    """Options under which every parameter that a method trains has moved after `updates` updates of a tiny model."""

    updates: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodFacts:
    """What a method says about itself: read by the documentation, `blockllm methods` and the checks before a run.

    Attributes:
        title: name as in the literature.
        summary: one sentence on the rule.
        paper: citation with arXiv number, or the usual reference.
        family: "dense", "control", "projection", "block coordinate", ...
        variants: words that `method.variant` may take; the first is the default.
        keeps: what is kept of the gradient, in words.
        layerwise: whether updates may run inside the backward pass, and whether they are then of a kind that does not
            change when its gradient is scaled, so that clipping may be on.
        cycle: how long it takes until every trained tensor has moved, for tests.
        hyperparameters: per model size (`60m`, ...), used for the nearest size; "*" holds where no size is listed.
        limits: what it cannot do, one sentence each, for the documentation.
    """

    title: str
    summary: str
    paper: str
    family: str
    keeps: str
    hyperparameters: Mapping[str, Hyperparameters]
    variants: tuple[str, ...] = ()
    layerwise: Literal["never", "scale_invariant", "any"] = "never"
    cycle: Cycle = Cycle()
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rates:
    """Learning rates of one update: `body` for matrices, `dense` for embedding, head and norms (by role)."""

    body: float
    dense: float

    def of(self, parameter: str) -> float:
        """The rate of the parameter of this name."""
        return self.dense if role_of(parameter) in DENSE_ROLES else self.body


@dataclass(frozen=True)
class Setting:
    """What a method knows of the run beside its own options.

    Attributes:
        seed: of all draws of the method, each keyed by (seed, parameter name, step).
        precision: dtypes of weights, accumulators, moments, and the rounding of bf16 writes.
        micro_batches: backward passes per update.
        peak: the highest rates of the schedule.
        layerwise_allowed: whether the run lets weights be written inside the backward pass; the method still has to
            ask `micro_batches`.
    """

    seed: int
    precision: Precision
    micro_batches: int = 1
    peak: Rates = Rates(0.0, 0.0)
    layerwise_allowed: bool = True


@dataclass(frozen=True)
class Backward:
    """A pass that runs forward and backward over the batch and feeds `routes`.

    A key is the name of a parameter, or `<parameter>@<anything>` where one parameter has several routes. A parameter
    without a route is frozen during the pass.
    """

    routes: Mapping[str, Route]


@dataclass(frozen=True)
class PassResult:
    """What one pass left: the routes' results under their keys, and the loss.

    Attributes:
        gradients: key of `Backward.routes` -> what the route kept; a route that no gradient reached is absent. A method
            may take entries out, so that their memory is free before the update ends.
        loss: mean negative log likelihood over the target tokens of the whole batch, float64 scalar on the device.
    """

    gradients: dict[str, Tensor]
    loss: Tensor


@dataclass(frozen=True)
class Held:
    """A tensor that a method holds between updates, for counting."""

    name: str
    category: Category
    tensor: Tensor


class Method(ABC):
    """One training method. See the module docstring for the order in which the parts are called."""

    name: ClassVar[str]
    facts: ClassVar[MethodFacts]
    Options: ClassVar[type[MethodOptions]]

    @abstractmethod
    def __init__(self, options: Any, setting: Setting) -> None:
        """Keep `options` (an instance of `Options`) and `setting`; allocate nothing."""

    @abstractmethod
    def plan(self, shapes: Mapping[str, tuple[int, ...]]) -> list[TensorPlan]:
        """Every tensor the method will hold for parameters of `shapes`: accumulated gradients, state, copies.

        Weights themselves are not the method's. Where it depends on the data which tensors those will be, the plan is
        an upper bound per category.

        Raises:
            RecipeError: the options do not fit these shapes.
        """

    def trains(self, name: str) -> bool:
        """Whether the parameter `name` is ever written."""
        return True

    @abstractmethod
    def prepare(self, model: nn.Module) -> None:
        """Take hold of the model's parameters and allocate state. Called once, before any pass."""

    @abstractmethod
    def passes(self, step: int, rates: Rates) -> Generator[Backward, PassResult, None]:
        """Yield the passes of update `step` (from 1); each is answered with its result before the next is asked.

        `rates` are those of this update, for routes that write weights inside the backward pass.
        """

    def choose(self, step: int, results: Sequence[PassResult]) -> dict[str, Tensor]:
        """Make the choices of update `step` and return the tensors it will be written from, by parameter name.

        The trainer takes finiteness and the kept norm over these tensors and scales them in place when it clips.
        The default returns the gradients of the last pass.
        """
        return results[-1].gradients

    @abstractmethod
    def update(
        self, step: int, rates: Rates, chosen: Mapping[str, Tensor], loss: float, *, count_unchanged: bool = False
    ) -> list[Event]:
        """Write the weights of update `step` from what `choose` returned; `chosen` may be overwritten.

        `loss` is that of the last pass: nats per target token of the whole batch, finite.

        With `count_unchanged`, writes rounded to bf16 count the entries that kept their value (see `unchanged`).
        """

    _unchanged: Tensor | None = None
    """What the last update counted, a scalar on its device; None if it did not count."""

    @property
    def unchanged(self) -> float | None:
        """Share of the bf16 entries written by the last update that kept their value; None if it did not count them."""
        return None if self._unchanged is None else float(self._unchanged)

    def rate_factor(self, step: int) -> float:
        """Factor on the schedule's rates at update `step`; a pure function."""
        return 1.0

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All state that later updates depend on: a flat dict, str -> Tensor or plain JSON value.

        Keys are `<parameter name>.<state name>`, or a bare word for what belongs to no parameter.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put `state` back, exactly and in place.

        Raises:
            InputError: a tensor is missing, unexpected, or of another shape or dtype; the message names it and both.
        """

    @abstractmethod
    def held(self) -> Iterator[Held]:
        """The tensors that the method holds between updates, each once."""

    @property
    @abstractmethod
    def state_entries(self) -> int:
        """Elements of first moments held now."""

    @property
    @abstractmethod
    def trainable_entries(self) -> int:
        """Weights that the next update can write."""

    def merged_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Plain Llama weights under Hugging Face names, for evaluation and export; no copy where none is needed."""
        return {name: parameter.detach() for name, parameter in model.named_parameters()}


StateDtype = Literal["fp32", "bf16"]
