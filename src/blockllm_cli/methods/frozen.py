"""The control: embedding, head and norms learn, every other matrix stays as it was drawn."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from blockllm_cli.methods.base import Hyperparameters, MethodFacts
from blockllm_cli.methods.dense import AdamOptions, DenseMethod
from blockllm_cli.model.roles import DENSE_ROLES, role_of
from blockllm_cli.optim.adam import AdamRule


class FrozenOptions(AdamOptions):
    """The [method] table of `frozen`."""

    weight_decay: float = Field(
        default=0.0,
        ge=0.0,
        description="Decoupled decay: before each update trained weights shrink by rate * weight_decay; at least 0.",
    )


class Frozen(DenseMethod):
    """AdamW at `schedule.dense_rate` on the roles embedding, head and norm; no gradient is made for anything else.

    A method that does not beat this control has gained nothing from training the matrices.
    """

    name = "frozen"
    Options = FrozenOptions
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="Frozen body",
        summary="Control: AdamW on embedding, head and norms; attention and MLP matrices never move.",
        paper="none; a control of this project",
        family="control",
        keeps="the full gradient of embedding, head and norms, until the update; nothing of the matrices",
        hyperparameters={
            # Searched on 6.8M parameters and 1.2M tokens of real text; only dense_rate has an effect.
            "9m": Hyperparameters(learning_rate=1e-2, dense_rate=1e-2, source="ours, from a short search"),
            "130m": Hyperparameters(learning_rate=1e-2, dense_rate=1e-2, source="ours, not tuned"),
            "1b": Hyperparameters(learning_rate=5e-3, dense_rate=5e-3, source="ours, not tuned"),
        },
        limits=("Attention and MLP matrices stay random: this is a yardstick, not a way to train a model.",),
    )

    @staticmethod
    def _rule(options: FrozenOptions) -> AdamRule:
        return AdamRule(options.betas, options.eps, options.weight_decay, decoupled=True)

    def trains(self, name: str) -> bool:
        """Only embedding, head and norms."""
        return role_of(name) in DENSE_ROLES
