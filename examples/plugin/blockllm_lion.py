"""Lion on every parameter: the sign of a momentum, so one state value per weight instead of Adam's two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from blockllm_cli.methods.base import Hyperparameters, MethodFacts
from blockllm_cli.methods.dense import Beta, DenseMethod, DenseOptions


class LionOptions(DenseOptions):
    """The [method] table of `lion`."""

    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.99),
        description="Share of the momentum in the direction of an update, and its decay rate, each in [0, 1).",
    )
    weight_decay: float = Field(
        default=0.0, ge=0.0, description="Decoupled decay: weights shrink by learning rate * weight_decay; at least 0."
    )


@dataclass(frozen=True)
class LionRule:
    """One update of Lion with its constants; a `DenseRule`."""

    betas: tuple[float, float]
    weight_decay: float

    @property
    def slots(self) -> tuple[str, ...]:
        """The momentum."""
        return ("exp_avg",)

    def apply(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        slots: Sequence[Sequence[Tensor]],
        *,
        step: int,
        lr: float,
    ) -> None:
        """Move every weight by `lr` against the sign of its momentum, of which the newest gradient is part."""
        weights, gradients, exp_avgs = list(weights), list(gradients), list(slots[0])
        directions = torch._foreach_lerp(exp_avgs, gradients, 1.0 - self.betas[0])
        torch._foreach_sign_(directions)
        torch._foreach_mul_(weights, 1.0 - lr * self.weight_decay)
        torch._foreach_add_(weights, directions, alpha=-lr)
        torch._foreach_lerp_(exp_avgs, gradients, 1.0 - self.betas[1])


class Lion(DenseMethod):
    """Chen et al. 2023 (arXiv 2302.06675)."""

    name = "lion"
    Options = LionOptions
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="Lion",
        summary="Moves every parameter by the sign of its momentum; one state value per weight.",
        paper="Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023, arXiv 2302.06675",
        family="dense",
        keeps="the full gradient of every parameter, until the update",
        hyperparameters={"60m": Hyperparameters(learning_rate=1e-4, source="ours, not tuned")},
        limits=("All entries move equally far, so its rate is a third to a tenth of Adam's.",),
    )

    @staticmethod
    def _rule(options: LionOptions) -> LionRule:
        return LionRule(options.betas, options.weight_decay)
