"""Adam and AdamW against torch's own optimizers (bit for bit) and against recorded runs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from blockllm_cli.gradients.clip import kept_norm, scale_to
from blockllm_cli.optim.adam import AdamRule, adam_step

SHAPES = [(24, 16), (16, 24), (37,), (1,), (40, 3, 5)]
PARAMETERS = ("tall", "wide", "square", "norm", "embed")
GOLDEN_ATOL, GOLDEN_RTOL = 5e-6, 1e-5


def draws(count, seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=draw).to(dtype) for shape in SHAPES] for _ in range(count)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_torchs_fused_optimizer_to_the_bit(dtype, decoupled, weight_decay):
    """50 updates under a rate that changes at each: weights and both moments."""
    weights, *gradients = draws(51, seed=1, dtype=dtype)
    theirs = [torch.nn.Parameter(weight.clone()) for weight in weights]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(theirs, lr=1.0, betas=(0.9, 0.95), eps=1e-7, weight_decay=weight_decay, fused=True)
    moments = [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]
    for step, grads in enumerate(gradients, start=1):
        lr = 1e-2 * (step / 10 if step <= 10 else 1.0 - step / 60)
        adam_step(
            weights,
            grads,
            *moments,
            step=step,
            lr=lr,
            betas=(0.9, 0.95),
            eps=1e-7,
            weight_decay=weight_decay,
            decoupled=decoupled,
        )
        optimizer.param_groups[0]["lr"] = lr
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        for mine, parameter, exp_avg, exp_avg_sq in zip(weights, theirs, *moments, strict=True):
            assert torch.equal(mine, parameter.detach())
            assert torch.equal(exp_avg, optimizer.state[parameter]["exp_avg"])
            assert torch.equal(exp_avg_sq, optimizer.state[parameter]["exp_avg_sq"])


def test_gradients_are_not_touched():
    weights, grads = draws(2, seed=2)
    before = [grad.clone() for grad in grads]
    moments = [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]
    AdamRule(weight_decay=0.1).apply(weights, grads, moments, step=1, lr=0.1)
    assert all(torch.equal(grad, old) for grad, old in zip(grads, before, strict=True))


def test_nothing_to_update_is_no_error():
    AdamRule().apply([], [], [[], []], step=1, lr=0.1)


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("adam")


@pytest.fixture(scope="module")
def hyper():
    with safe_open(Path(__file__).parents[2] / "golden" / "adam.safetensors", "pt") as file:
        return json.loads(file.metadata()["variants"])


def replay(recorded, variant, rule, rates, clip=0.0):
    """Feed the recorded gradients to `rule`, compare every weight that was stored; return slots and norms."""
    weights = [recorded[f"w0.{name}"].clone() for name in PARAMETERS]
    slots = [[torch.zeros_like(weight) for weight in weights] for _ in rule.slots]
    norms, compared = [], 0
    for step in range(1, 13):
        grads = [recorded[f"grad.{step}.{name}"].clone() for name in PARAMETERS]
        if clip:
            norms.append(float(kept_norm(grads)))
            scale_to(grads, norms[-1], clip)
        rule.apply(weights, grads, slots, step=step, lr=rates[step - 1])
        for name, weight in zip(PARAMETERS, weights, strict=True):
            key = f"{variant}.w.{step}.{name}"
            if key in recorded:
                torch.testing.assert_close(weight, recorded[key], atol=GOLDEN_ATOL, rtol=GOLDEN_RTOL, msg=key)
                compared += 1
    assert compared >= 8
    return slots, norms


@pytest.mark.parametrize("variant", ["adam", "adam_l2", "adamw", "adamw_eps6"])
def test_recorded_runs(recorded, hyper, variant):
    values = hyper[variant]
    rule = AdamRule(tuple(values["betas"]), values["eps"], values["weight_decay"], decoupled="adamw" in variant)
    slots, _ = replay(recorded, variant, rule, [values["lr"]] * 12)
    for slot, tensors in zip(rule.slots, slots, strict=True):
        for name, tensor in zip(PARAMETERS, tensors, strict=True):
            torch.testing.assert_close(tensor, recorded[f"{variant}.{slot}.12.{name}"], atol=1e-7, rtol=GOLDEN_RTOL)


def test_recorded_run_with_schedule_and_clipping(recorded):
    rates = recorded["adam_sched_clip.lr"].tolist()
    _, norms = replay(recorded, "adam_sched_clip", AdamRule(), rates, clip=1.0)
    torch.testing.assert_close(torch.tensor(norms), recorded["adam_sched_clip.grad_norm"], atol=0, rtol=1e-6)
    assert max(norms) > 1.0  # so clipping took part


def test_the_recorded_runs_tell_where_eps_is_added(recorded, hyper):
    """The other form of Adam, which adds eps before the bias correction, is far outside the tolerance."""
    theirs, other = (recorded[f"{variant}.w.12.norm"] for variant in ("adamw_eps6", "hf_adamw"))
    assert (theirs - other).abs().max() > 100 * GOLDEN_ATOL
