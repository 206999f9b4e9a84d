"""One update of a method with all its passes, in the order in which the trainer makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from blockllm_cli.gradients.clip import kept_norm, scale_to
from blockllm_cli.gradients.engine import routed
from blockllm_cli.gradients.routes import Route
from blockllm_cli.methods.base import Backward, Event, Method, PassResult, Rates
from blockllm_cli.model.batch import Batch
from blockllm_cli.model.llama import LlamaForCausalLM
from blockllm_cli.testing.tiny import ROWS, tiny_batch

Feeding = Literal["auto", "hook"]


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
    feeding: Feeding = "auto",
    between: Callable[[Mapping[str, Route]], None] = lambda routes: None,
) -> Asked:
    """Ask for the passes of an update, run them, and let the method choose.

    Args:
        method: prepared with `model`.
        model: a tiny Llama.
        step: number of the update, from 1.
        rates: of the update.
        batch: gives the rows of an update that a slice names.
        rows: of one update.
        micro_batches: divides `rows`.
        loss_factor: on every gradient; not-a-number makes an update that a trainer has to give up.
        feeding: see `routed`.
        between: called with the routes after each micro-batch.
    """
    size = rows // micro_batches
    parts = [batch(step, slice(start, start + size)) for start in range(0, rows, size)]
    results: list[PassResult] = []
    passes = method.passes(step, rates)
    asked = next(passes, None)
    while asked is not None:
        results.append(_run_pass(model, asked, parts, loss_factor, feeding, between))
        try:
            asked = passes.send(results[-1])
        except StopIteration:
            asked = None
    chosen = method.choose(step, results)
    return Asked(results, chosen, float(results[-1].loss), float(kept_norm(chosen.values())))


def _run_pass(
    model: LlamaForCausalLM,
    asked: Backward,
    parts: list[Batch],
    loss_factor: float,
    feeding: Feeding,
    between: Callable[[Mapping[str, Route]], None],
) -> PassResult:
    targets = sum(part.num_targets for part in parts)
    nll = torch.zeros((), dtype=torch.float64)
    with routed(model, asked.routes, feeding=feeding):
        for part in parts:
            loss, part_nll = model.loss(part, scale=loss_factor / targets)
            if asked.routes:
                loss.backward()  # type: ignore[no-untyped-call]
            nll += part_nll
            between(asked.routes)
    gradients = {key: kept for key, route in asked.routes.items() if (kept := route.result()) is not None}
    return PassResult(gradients, nll / targets)


def drive_update(
    method: Method,
    model: LlamaForCausalLM,
    step: int,
    rates: Rates,
    *,
    batch: Callable[[int, slice], Batch] = tiny_batch,
    rows: int = ROWS,
    micro_batches: int = 1,
    clip: float = 0.0,
    feeding: Feeding = "auto",
    between: Callable[[Mapping[str, Route]], None] = lambda routes: None,
    count_unchanged: bool = False,
) -> Driven:
    """One whole update; `clip` limits the kept norm (0 is off), all else is as in `ask_update` and `Method.update`."""
    asked = ask_update(
        method,
        model,
        step,
        rates,
        batch=batch,
        rows=rows,
        micro_batches=micro_batches,
        feeding=feeding,
        between=between,
    )
    if clip:
        scale_to(asked.chosen.values(), asked.norm, clip)
    events = method.update(step, rates, asked.chosen, asked.loss, count_unchanged=count_unchanged)
    return Driven(asked.loss, asked.norm, events)
