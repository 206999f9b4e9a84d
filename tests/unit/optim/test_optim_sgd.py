"""SGD against torch's own (bit for bit) and against recorded runs."""

import pytest
import torch

from blockllm_cli.optim.sgd import SgdRule

SHAPES = [(24, 16), (37,), (40, 3, 5)]
PARAMETERS = ("tall", "wide", "square", "norm", "embed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_is_torchs_sgd_to_the_bit(momentum, nesterov, weight_decay, dtype):
    draw = torch.Generator().manual_seed(4)
    weights = [torch.randn(shape, generator=draw).to(dtype) for shape in SHAPES]
    theirs = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = torch.optim.SGD(
        theirs, lr=1.0, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, foreach=True
    )
    rule = SgdRule(momentum, nesterov, weight_decay)
    slots = [[torch.zeros_like(weight) for weight in weights] for _ in rule.slots]
    assert len(slots) == (momentum > 0)
    for step in range(1, 31):
        lr = 0.1 / step
        grads = [torch.randn(shape, generator=draw).to(dtype) for shape in SHAPES]
        optimizer.param_groups[0]["lr"] = lr
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        rule.apply(weights, grads, slots, step=step, lr=lr)
        for mine, parameter in zip(weights, theirs, strict=True):
            assert torch.equal(mine, parameter.detach())


def test_bf16_momentum_is_right_at_every_size():
    """torch's fused kernel for bf16 on the CPU fills the buffer with garbage; ours must not come to use it."""
    for size in (1, 16, 64, 1000):
        draw = torch.Generator().manual_seed(size)
        weight, grad, buffer = (torch.randn(size, generator=draw).bfloat16() for _ in range(3))
        wanted = buffer.float() * 0.9 + grad.float()
        SgdRule(0.9).apply([weight], [grad], [[buffer]], step=5, lr=0.1)
        torch.testing.assert_close(buffer.float(), wanted, atol=0.02, rtol=0.01)


@pytest.mark.parametrize(
    ("variant", "rule"), [("sgd", SgdRule()), ("sgdm", SgdRule(0.9)), ("sgdm_nesterov", SgdRule(0.9, nesterov=True))]
)
def test_recorded_runs(golden, variant, rule):
    recorded = golden("adam")
    weights = [recorded[f"w0.{name}"].clone() for name in PARAMETERS]
    slots = [[torch.zeros_like(weight) for weight in weights] for _ in rule.slots]
    compared = 0
    for step in range(1, 13):
        grads = [recorded[f"grad.{step}.{name}"].clone() for name in PARAMETERS]
        rule.apply(weights, grads, slots, step=step, lr=0.1)
        for name, weight in zip(PARAMETERS, weights, strict=True):
            key = f"{variant}.w.{step}.{name}"
            if key in recorded:
                torch.testing.assert_close(weight, recorded[key], atol=5e-6, rtol=1e-5, msg=key)
                compared += 1
    assert compared >= 6
