"""Adam on every parameter: the dense yardstick as the papers run it, with decay as an L2 term if any."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from blockllm_cli.methods.base import Hyperparameters, MethodFacts
from blockllm_cli.methods.dense import AdamOptions, DenseMethod
from blockllm_cli.optim.adam import AdamRule


class L2AdamOptions(AdamOptions):
    """The [method] table of `adam`."""

    weight_decay: float = Field(
        default=0.0, ge=0.0, description="L2 term: weight_decay * weight is added to the gradient; at least 0."
    )


class Adam(DenseMethod):
    """Kingma and Ba 2015 (arXiv 1412.6980), computed by torch's fused kernel in torch's form."""

    name = "adam"
    Options = L2AdamOptions
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="Adam",
        summary="Adam on every parameter; weight decay, if any, is an L2 term in the gradient.",
        paper="Kingma and Ba, Adam: A Method for Stochastic Optimization, ICLR 2015, arXiv 1412.6980",
        family="dense",
        keeps="the full gradient of every parameter, until the update",
        hyperparameters={
            "60m": Hyperparameters(learning_rate=1e-3, source="ours, not tuned"),
            "130m": Hyperparameters(learning_rate=1e-3, source="ours, not tuned"),
            "350m": Hyperparameters(learning_rate=6e-4, source="ours, not tuned"),
            "1b": Hyperparameters(learning_rate=4e-4, source="ours, not tuned"),
            "7b": Hyperparameters(learning_rate=3e-4, source="ours, not tuned"),
        },
        limits=("Saves no memory: two state values for every weight.",),
    )

    @staticmethod
    def _rule(options: L2AdamOptions) -> AdamRule:
        return AdamRule(options.betas, options.eps, options.weight_decay, decoupled=False)
