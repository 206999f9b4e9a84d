"""The kept norm and clipping by it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockllm_cli.gradients.clip import kept_norm, scale_to


def draw(*sizes, dtype=torch.float32):
    made = torch.Generator().manual_seed(8)
    return [(torch.randn(size, generator=made) + 0.5).to(dtype) for size in sizes]


def exact(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [(1,), (1024,), (1025,), (2**18 + 1,), (3_000_001,), (100,) * 2000, (5, 3_000_000, 2**19, 1)]
)
def test_is_exact_for_many_small_and_few_large_tensors(sizes, dtype):
    tensors = draw(*sizes, dtype=dtype)
    norm = kept_norm(tensors)
    assert norm.dtype == torch.float64
    assert float(norm) == pytest.approx(exact(tensors), rel=1e-6)


@pytest.mark.parametrize("value", [1.1, 0.3337, 7e-5])
def test_equal_entries_do_not_add_up_their_rounding(value):
    tensor = torch.full((1_000_000,), value)
    assert float(kept_norm([tensor])) == pytest.approx(exact([tensor]), rel=1e-6)


def test_does_not_depend_on_shape_or_strides():
    (tensor,) = draw(600)
    views = [tensor.view(20, 30), tensor.view(20, 30).t(), tensor.view(2, 3, 100)]
    assert {float(kept_norm([view])) for view in views[::2]} == {float(kept_norm([tensor]))}
    assert float(kept_norm([views[1]])) == pytest.approx(float(kept_norm([tensor])), rel=1e-6)


def test_bf16_does_not_overflow_or_saturate():
    """A million entries of 1000: a sum of squares kept in bf16 would stand still long before."""
    assert float(kept_norm([torch.full((1_000_000,), 1000.0).bfloat16()])) == pytest.approx(1e6, rel=1e-6)
    assert float(kept_norm([torch.full((4,), 1e18).bfloat16()])) == pytest.approx(2e18, rel=1e-2)


def test_nothing_has_norm_zero():
    assert float(kept_norm([])) == 0.0
    assert float(kept_norm([torch.zeros(3)])) == 0.0
    assert float(kept_norm([torch.empty(0), torch.empty(0, 5, dtype=torch.bfloat16)])) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bad_entry_is_seen(value, dtype):
    tensors = draw(10, 100_000, 10, dtype=dtype)
    tensors[1][77_777] = value
    assert not math.isfinite(kept_norm(tensors))


def test_tensors_are_not_touched():
    tensors = draw(100, 70_000)
    before = [tensor.clone() for tensor in tensors]
    kept_norm(tensors)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


@settings(deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_scaling_is_that_of_torch(scale, limit):
    tensors = [scale * tensor for tensor in draw(40, 7)]
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in tensors]
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.grad = tensor.clone()
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    norm = float(kept_norm(tensors))
    scale_to(tensors, norm, limit)
    for parameter, tensor in zip(parameters, tensors, strict=True):
        torch.testing.assert_close(tensor, parameter.grad, atol=0, rtol=2e-6)
    assert float(kept_norm(tensors)) <= min(norm, limit) * (1 + 1e-6)


def test_a_norm_below_the_limit_changes_no_bit():
    tensors = draw(40, 7)
    before = [tensor.clone() for tensor in tensors]
    scale_to(tensors, float(kept_norm(tensors)), 1e3)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
