"""One update of a method with all its passes, in the order in which the trainer makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from blockllm_cli.gradients.clip import kept_norm, scale_to
from blockllm_cli.gradients.routes import Route
from blockllm_cli.methods.base import Event, Method, PassResult, Rates
from blockllm_cli.model.batch import Batch
from blockllm_cli.model.llama import LlamaForCausalLM
from blockllm_cli.testing.tiny import ROWS, tiny_batch
from blockllm_cli.training.passes import run_passes


@dataclass
class Asked:
    """An update up to the moment before `Method.update`: nothing is written but by layer-wise routes.

    Attributes:
        results: of each pass.
        chosen: what the update would be written from.
        loss: of the last pass, nats per target.
        norm: kept norm over `chosen`.
    """

    results: list[PassResult]
    chosen: dict[str, Tensor]
    loss: float
    norm: float


@dataclass
class Driven:
    """What one update came to: loss before it, kept norm before clipping, events."""

    loss: float
    norm: float
    events: list[Event]


def ask_update(
    method: Method,
    model: LlamaForCausalLM,
    step: int,
    rates: Rates,
    *,
    batch: Callable[[int, slice], Batch] = tiny_batch,
    rows: int = ROWS,
    micro_batches: int = 1,
    loss_factor: float = 1.0,
    between: Callable[[Mapping[str, Route]], None] = lambda routes: None,
) -> Asked:
    """Run the passes of an update as the trainer does, and let the method choose.

    Args:
        method: prepared with `model`.
        model: a tiny Llama.
        step: number of the update, from 1.
        rates: of the update.
        batch: gives the rows of an update that a slice names.
        rows: of one update.
        micro_batches: divides `rows`.
        loss_factor: on every gradient; not-a-number makes an update that a trainer has to give up.
        between: called with the routes after each micro-batch.
    """
    size = rows // micro_batches
    parts = [batch(step, slice(start, start + size)) for start in range(0, rows, size)]
    targets = sum(part.num_targets for part in parts)
    results = run_passes(
        method,
        model,
        step,
        rates,
        lambda: parts,
        targets=targets,
        scale=loss_factor / targets,
        before_write=lambda nll: None,
        after_backward=between,
    )
    chosen = method.choose(step, results)
    return Asked(results, chosen, float(results[-1].loss), float(kept_norm(chosen.values())))


def drive_update(
    method: Method,
    model: LlamaForCausalLM,
    step: int,
    rates: Rates,
    *,
    clip: float = 0.0,
    count_unchanged: bool = False,
    **asking: Any,
) -> Driven:
    """One whole update.

    Args:
        method: as in `ask_update`, like `model`, `step` and `rates`.
        model: see there.
        step: see there.
        rates: see there.
        clip: limit of the kept norm; 0 is off.
        count_unchanged: see `Method.update`.
        asking: the other arguments of `ask_update`.
    """
    asked = ask_update(method, model, step, rates, **asking)
    if clip:
        scale_to(asked.chosen.values(), asked.norm, clip)
    events = method.update(step, rates, asked.chosen, asked.loss, count_unchanged=count_unchanged)
    return Driven(asked.loss, asked.norm, events)
