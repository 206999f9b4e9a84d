"""AdamW on every parameter: the dense yardstick with decoupled weight decay."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from blockllm_cli.methods.base import Hyperparameters, MethodFacts
from blockllm_cli.methods.dense import AdamOptions, DenseMethod
from blockllm_cli.optim.adam import AdamRule


class AdamWOptions(AdamOptions):
    """The [method] table of `adamw`."""

    weight_decay: float = Field(
        default=0.0,
        ge=0.0,
        description="Decoupled decay: before each update weights shrink by learning rate * weight_decay; at least 0.",
    )


class AdamW(DenseMethod):
    """Loshchilov and Hutter 2019 (arXiv 1711.05101), computed by torch's fused kernel in torch's form."""

    name = "adamw"
    Options = AdamWOptions
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="AdamW",
        summary="Adam with decoupled weight decay on every parameter; the dense yardstick of every comparison.",
        paper="Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, arXiv 1711.05101",
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
    def _rule(options: AdamWOptions) -> AdamRule:
        return AdamRule(options.betas, options.eps, options.weight_decay, decoupled=True)
