"""The passes of one update: the part of the loop that the trainer and the contract suite for methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from blockllm_cli.gradients.engine import routed
from blockllm_cli.gradients.routes import Route
from blockllm_cli.methods.base import Backward, Method, PassResult, Rates
from blockllm_cli.model.batch import Batch
from blockllm_cli.model.llama import LlamaForCausalLM


def run_passes(
    method: Method,
    model: LlamaForCausalLM,
    step: int,
    rates: Rates,
    batches: Callable[[], Iterable[Batch]],
    *,
    targets: int,
    scale: float,
    before_write: Callable[[float], None],
    after_backward: Callable[[Mapping[str, Route]], None],
) -> list[PassResult]:
    """Ask `method` for the passes of an update, and run each over all of its micro-batches.

    Args:
        method: prepared with `model`.
        model: on the device of the batches.
        step: number of the update, from 1.
        rates: of the update.
        batches: gives the micro-batches of the update anew for each pass, on the model's device; one without targets
            is passed over.
        targets: target tokens of all of them together.
        scale: of the loss that is differentiated: 1 / `targets`.
        before_write: called before a backward pass in which weights are written, with the sum of the micro-batch's
            negative log likelihoods; it may raise.
        after_backward: called with the routes after each micro-batch.
    """
    results: list[PassResult] = []
    passes = method.passes(step, rates)
    asked = next(passes, None)
    while asked is not None:
        results.append(_run_pass(asked, model, batches(), targets, scale, before_write, after_backward))
        try:
            asked = passes.send(results[-1])
        except StopIteration:
            asked = None
    return results


def _run_pass(
    asked: Backward,
    model: LlamaForCausalLM,
    batches: Iterable[Batch],
    targets: int,
    scale: float,
    before_write: Callable[[float], None],
    after_backward: Callable[[Mapping[str, Route]], None],
) -> PassResult:
    nll = torch.zeros((), dtype=torch.float64, device=model.head_weight.device)
    writes = any(route.writes for route in asked.routes.values())
    with routed(model, asked.routes):
        for batch in batches:
            if batch.num_targets == 0:
                continue
            loss, part_nll = model.loss(batch, scale=scale)
            if writes:
                before_write(float(part_nll))
            if asked.routes:
                torch.autograd.backward(loss)
            nll += part_nll
            after_backward(asked.routes)
    gradients = {name: kept for name, route in asked.routes.items() if (kept := route.result()) is not None}
    return PassResult(gradients, nll / targets)
