"""What `precision = "auto"` goes by."""

from __future__ import annotations

import pytest
import torch

from blockllm_cli.training import precision
from blockllm_cli.training.precision import ProductSpeed, bf16_is_faster, measure_products

CPU = torch.device("cpu")


def test_both_rates_are_measured() -> None:
    speed = measure_products(CPU)
    assert speed.fp32 > 0
    assert speed.bf16 > 0


@pytest.mark.parametrize(("bf16", "faster"), [(2.0, True), (1.05, False), (0.5, False), (0.0, False)])
def test_bf16_must_win_by_more_than_noise(monkeypatch: pytest.MonkeyPatch, bf16: float, faster: bool) -> None:
    monkeypatch.setattr(precision, "measure_products", lambda device: ProductSpeed(1.0, bf16))
    assert bf16_is_faster(CPU) is faster


def test_a_device_without_bf16_products_has_a_rate_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.mm

    def without_bf16(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.bfloat16:
            raise TypeError("BFloat16 is not supported here")
        return product(left, right)

    monkeypatch.setattr(torch, "mm", without_bf16)
    assert measure_products(CPU).bf16 == 0
    assert not bf16_is_faster(CPU)


def test_the_best_of_several_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which every second product takes long: bf16 and fp32 both have their fast ones."""
    ticks = iter([0.0, 9.0, 10.0, 19.0, 20.0, 20.5, 30.0, 30.25] + [40.0, 49.0] * (2 * precision.REPEATS - 4))
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(ticks))
    operations = 2 * precision.ROWS * precision.WIDTH**2
    assert measure_products(CPU) == ProductSpeed(fp32=operations / 0.5, bf16=operations / 0.25)
