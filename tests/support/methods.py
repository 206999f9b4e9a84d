"""A toy Llama and a short loop of updates for one method, as the trainer makes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from blockllm_cli.gradients.engine import routed
from blockllm_cli.gradients.routes import Route
from blockllm_cli.methods.base import Method, Rates, Setting
from blockllm_cli.methods.registry import method_class
from blockllm_cli.model.llama import LlamaForCausalLM
from blockllm_cli.optim.precision import PrecisionName, Rounding, precision_of
from blockllm_cli.testing.driver import Driven, drive_update
from blockllm_cli.testing.tiny import LENGTH, ROWS
from blockllm_cli.testing.tiny import tiny_batch as toy_batch
from blockllm_cli.testing.tiny import tiny_config as toy_config
from blockllm_cli.testing.tiny import tiny_llama as toy_llama

__all__ = [
    "LENGTH",
    "PEAK",
    "ROWS",
    "Driven",
    "drive_update",
    "make_method",
    "run_update",
    "run_updates",
    "toy_batch",
    "toy_config",
    "toy_llama",
]

PEAK = Rates(1e-2, 1e-2)


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


def run_updates(method: Method, model: LlamaForCausalLM, steps: Iterable[int], rates: Rates, **keywords) -> list[float]:
    return [run_update(method, model, step, rates, **keywords) for step in steps]
