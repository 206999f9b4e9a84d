"""The table of precisions."""

import pytest
import torch

from blockllm_cli.optim.precision import precision_of

F, B = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("name", "weights", "one", "many", "moments", "master"),
    [
        ("fp32", F, F, F, F, False),
        ("bf16", B, B, F, F, False),
        ("bf16_master", B, F, F, F, True),
        ("bf16_papers", B, B, B, B, False),
    ],
)
def test_dtypes_of_each_precision(name, weights, one, many, moments, master):
    precision = precision_of(name)
    assert (precision.weights, precision.moments, precision.has_master) == (weights, moments, master)
    assert (precision.accumulator(1), precision.accumulator(8)) == (one, many)
    assert precision.rounding == "nearest"


def test_state_dtype_overrides_the_moments_only():
    assert precision_of("bf16_papers").with_moments("fp32").moments == F
    precision = precision_of("bf16_master", "stochastic").with_moments("bf16")
    assert (precision.moments, precision.weights, precision.has_master, precision.rounding) == (
        B,
        B,
        True,
        "stochastic",
    )
