from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from blockllm_cli.model.elementwise import gated_silu, rms_norm
from blockllm_cli.model.rotary import Rotary, turned


def plain_norm(x, weight, eps):
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def plain_turn(x, length, width):
    frequencies = 1.0 / 10_000 ** (torch.arange(0, width, 2).double() / width)
    angles = torch.outer(torch.arange(length).double(), frequencies)
    cosine, sine = (torch.cat((f(angles), f(angles)), -1).unsqueeze(1) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return (x * cosine + torch.cat((-second, first), -1) * sine).transpose(1, 2)


def outcome(function, tensors, upstream):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    result = function(*leaves)
    result.backward(upstream.to(result.dtype))
    return [result.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["norm", "gate"])
def test_value_and_gradients_are_those_of_plain_operators(dtype, name):
    torch.manual_seed(0)
    x, upstream = torch.randn(3, 5, 32), torch.randn(3, 5, 32)
    other = torch.randn(32) if name == "norm" else torch.randn(3, 5, 32)
    ours, plain = {
        "norm": (lambda a, b: rms_norm(a, b, 1e-6), lambda a, b: plain_norm(a, b, 1e-6)),
        "gate": (gated_silu, lambda a, b: F.silu(a) * b),
    }[name]
    tensors = [x.to(dtype), other.to(dtype)]
    exact = outcome(plain, [tensor.double() for tensor in tensors], upstream.to(dtype).double())
    for made, true in zip(outcome(ours, tensors, upstream), exact, strict=True):
        assert made.dtype == dtype
        assert (made.double() - true).norm() < (1e-6 if dtype == torch.float32 else 5e-3) * true.norm()


def test_the_norm_rounds_where_hugging_face_rounds():
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(32).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6), plain_norm(x, weight, 1e-6))


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_frozen_norm_makes_no_weight_gradient(is_frozen):
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8, requires_grad=not is_frozen)
    result = rms_norm(x, weight, 1e-6)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        result.backward(torch.ones(4, 8))
    sums = sum(event.name == "aten::sum" for event in seen.events())
    assert sums == (1 if is_frozen else 2)  # one of them is the mean along the last dimension
    assert (weight.grad is None) == is_frozen
    assert x.grad is not None


def test_channels_are_turned_in_halves():
    torch.manual_seed(0)
    x, upstream = torch.randn(2, 7, 3, 8), torch.randn(2, 3, 7, 8)
    rotary = Rotary(8, 10_000.0)
    ours = outcome(lambda a: turned(a, rotary.turn(7, a.device, a.dtype)), [x], upstream)
    exact = outcome(lambda a: plain_turn(a, 7, 8), [x.double()], upstream.double())
    for made, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(made.double(), true, atol=2e-6, rtol=1e-5)


def test_angles_are_made_once_per_length_and_serve_training_after_inference():
    rotary = Rotary(8, 10_000.0)
    device, dtype = torch.device("cpu"), torch.float32
    with torch.inference_mode():
        first = rotary.turn(7, device, dtype)
    again = rotary.turn(5, device, dtype)
    assert again.cosine.data_ptr() == first.cosine.data_ptr()
    assert not again.cosine.is_inference()
    x = torch.randn(1, 5, 1, 8, requires_grad=True)
    turned(x, again).sum().backward()
    assert rotary.turn(9, device, dtype).cosine.shape == (9, 4)
