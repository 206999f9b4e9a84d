"""The tiny Llama of the contract suite under short names, and a method by name."""

from __future__ import annotations

from blockllm_cli.methods.base import Method, Rates, Setting
from blockllm_cli.methods.registry import method_class
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
