"""A toy Llama and a short loop of updates for one method, as the trainer makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from blockllm_cli.gradients.clip import kept_norm, scale_to
from blockllm_cli.gradients.engine import routed
from blockllm_cli.gradients.routes import Route
from blockllm_cli.methods.base import Event, Method, PassResult, Rates, Setting
from blockllm_cli.methods.registry import method_class
from blockllm_cli.model.batch import Batch
from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.llama import LlamaForCausalLM, build_model
from blockllm_cli.optim.precision import PrecisionName, Rounding, precision_of

ROWS, LENGTH = 6, 12
PEAK = Rates(1e-2, 1e-2)


def toy_config(*, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )


def toy_llama(dtype: torch.dtype = torch.float32, *, tied: bool = False, seed: int = 3) -> LlamaForCausalLM:
    return build_model(toy_config(tied=tied), seed=seed, dtype=dtype, device=torch.device("cpu"))


def make_method(
    name: str,
    *,
    precision: PrecisionName = "fp32",
    rounding: Rounding = "nearest",
    micro_batches: int = 1,
    seed: int = 5,
    peak: Rates = PEAK,
    layerwise_allowed: bool = True,
    **options,
) -> Method:
    kind = method_class(name)
    setting = Setting(seed, precision_of(precision, rounding), micro_batches, peak, layerwise_allowed)
    return kind(kind.Options(**options), setting)


def toy_batch(step: int, rows: slice = slice(None)) -> Batch:
    """Rows of update `step`: half of the ids repeat, so that there is something to learn; all positions are targets."""
    draw = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(64, (ROWS, LENGTH + 1), generator=draw)
    ids[:, 1::2] = ids[:, 0:-1:2]
    ids = ids[rows]
    targets = ids[:, 1:].reshape(-1)
    return Batch(ids[:, :-1].contiguous(), None, torch.arange(targets.numel()), targets)


def run_update(
    method: Method,
    model: LlamaForCausalLM,
    step: int,
    rates: Rates,
    *,
    micro_batches: int = 1,
    routes: Mapping[str, Route] | None = None,
    **keywords,
) -> float:
    """One update of `method`, through `routes` instead of its own if they are given; returns the loss before it."""
    routes = routes or next(method.passes(step, rates)).routes
    loss = 0.0
    size = ROWS // micro_batches
    with routed(model, routes):
        for start in range(0, ROWS, size):
            part, nll = model.loss(toy_batch(step, slice(start, start + size)), scale=1.0 / (ROWS * LENGTH))
            part.backward()
            loss += float(nll) / (ROWS * LENGTH)
    chosen = {name: route.result() for name, route in routes.items()}
    method.update(step, rates, chosen, loss, **keywords)
    return loss


@dataclass
class Driven:
    """What one update came to: loss before it, kept norm before clipping, events."""

    loss: float
    norm: float
    events: list[Event]


def drive_update(
    method: Method,
    model: LlamaForCausalLM,
    step: int,
    rates: Rates,
    *,
    batch: Callable[[int, slice], Batch] = toy_batch,
    rows: int = ROWS,
    micro_batches: int = 1,
    clip: float = 0.0,
    feeding: Literal["auto", "hook"] = "auto",
    between: Callable[[Mapping[str, Route]], None] = lambda routes: None,
    carried_out: bool = True,
    **keywords,
) -> Driven:
    """One update with all its passes, in the order of the trainer; `between` is called after each micro-batch.

    Without `carried_out` it is given up before anything is written, as one with a non-finite norm is.
    """
    results: list[PassResult] = []
    passes = method.passes(step, rates)
    asked = next(passes, None)
    size = rows // micro_batches
    while asked is not None:
        nll = torch.zeros((), dtype=torch.float64)
        parts = [batch(step, slice(start, start + size)) for start in range(0, rows, size)]
        targets = sum(part.num_targets for part in parts)
        with routed(model, asked.routes, feeding=feeding):
            for part in parts:
                loss, part_nll = model.loss(part, scale=1.0 / targets)
                loss.backward()
                nll += part_nll
                between(asked.routes)
        kept = {key: value for key, route in asked.routes.items() if (value := route.result()) is not None}
        results.append(PassResult(kept, nll / targets))
        del kept
        try:
            asked = passes.send(results[-1])
        except StopIteration:
            asked = None
    chosen = method.choose(step, results)
    norm, loss = float(kept_norm(chosen.values())), float(results[-1].loss)
    if not carried_out:
        return Driven(loss, norm, [])
    if clip:
        scale_to(chosen.values(), norm, clip)
    return Driven(loss, norm, method.update(step, rates, chosen, loss, **keywords))


def run_updates(method: Method, model: LlamaForCausalLM, steps: Iterable[int], rates: Rates, **keywords) -> list[float]:
    return [run_update(method, model, step, rates, **keywords) for step in steps]
