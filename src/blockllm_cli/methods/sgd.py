"""SGD on every parameter: the floor of optimizer memory, one state value per weight or none."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from blockllm_cli.methods.base import Hyperparameters, MethodFacts
from blockllm_cli.methods.dense import DenseMethod, DenseOptions
from blockllm_cli.optim.sgd import SgdRule


class SgdOptions(DenseOptions):
    """The [method] table of `sgd`."""

    momentum: float = Field(
        default=0.9, ge=0.0, lt=1.0, description="Decay of the momentum buffer in [0, 1); 0 keeps no buffer."
    )
    nesterov: bool = Field(default=False, description="Nesterov's form of momentum; needs momentum above 0.")
    weight_decay: float = Field(
        default=0.0, ge=0.0, description="L2 term: weight_decay * weight is added to the gradient; at least 0."
    )

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov = true needs momentum above 0: set momentum = 0.9, or nesterov = false")
        return self


class Sgd(DenseMethod):
    """Stochastic gradient descent in torch's form: buffer = momentum * buffer + gradient, no dampening."""

    name = "sgd"
    Options = SgdOptions
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="SGD",
        summary="Stochastic gradient descent with momentum on every parameter.",
        paper="Sutskever, Martens, Dahl and Hinton, On the importance of initialization and momentum in deep learning, "
        "ICML 2013",
        family="dense",
        keeps="the full gradient of every parameter, until the update",
        hyperparameters={
            "60m": Hyperparameters(learning_rate=0.1, clip=1.0, source="ours, not tuned"),
        },
        limits=(
            "Far behind Adam on language models: gradients of embedding and matrices differ by orders of magnitude.",
        ),
    )

    @staticmethod
    def _rule(options: SgdOptions) -> SgdRule:
        return SgdRule(options.momentum, options.nesterov, options.weight_decay)
