"""AdamW as a method: against torch's optimizer on a real model, and its options."""

import pytest
import torch
from pydantic import ValidationError

from blockllm_cli.methods.adamw import AdamW
from blockllm_cli.methods.base import Rates
from blockllm_cli.model.roles import DENSE_ROLES, role_of
from support.methods import LENGTH, ROWS, drive_update, make_method, toy_batch, toy_llama


@pytest.mark.parametrize("tied", [False, True])
def test_is_torchs_adamw_with_two_groups_to_the_bit(tied):
    """50 updates: embedding, head and norms in one group, matrices in the other, rates that change at each update."""
    mine, theirs = toy_llama(tied=tied), toy_llama(tied=tied)
    method = make_method("adamw", betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1)
    method.prepare(mine)
    groups = ([], [])
    for name, parameter in theirs.named_parameters():
        groups[role_of(name) in DENSE_ROLES].append(parameter)
    body, dense = ({"params": group} for group in groups)
    optimizer = torch.optim.AdamW([body, dense], lr=1.0, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1, fused=True)
    for step in range(1, 51):
        rates = Rates(body=1e-3 * min(step / 10, 1.0), dense=1e-2 * (1 - step / 60))
        drive_update(method, mine, step, rates)
        body["lr"], dense["lr"] = rates.body, rates.dense
        for group, rate in zip(optimizer.param_groups, (rates.body, rates.dense), strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        theirs.loss(toy_batch(step), scale=1.0 / (ROWS * LENGTH))[0].backward()
        optimizer.step()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(mine.get_parameter(name), parameter), name


def test_decay_is_decoupled():
    """With a rate but no gradient to speak of, weights shrink by the rate times the decay, whatever the moments."""
    method, model = make_method("adamw", weight_decay=0.5), toy_llama()
    method.prepare(model)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    gradients = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    method.update(1, Rates(0.1, 0.2), gradients, 1.0)
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.detach(), 0.95 * before, atol=0, rtol=1e-6)
    assert model.model.norm.weight.tolist() == pytest.approx([0.9] * 16)


def test_defaults():
    options = AdamW.Options()
    assert (options.betas, options.eps, options.weight_decay, options.state_dtype) == ((0.9, 0.999), 1e-8, 0.0, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"betas": [0.9, 1.0]},
        {"betas": [0.9]},
        {"betas": [-0.1, 0.9]},
        {"eps": 0.0},
        {"weight_decay": -1.0},
        {"state_dtype": "fp16"},
        {"momentum": 0.9},
    ],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        AdamW.Options(**wrong)


def test_options_take_what_toml_gives():
    assert AdamW.Options(betas=[0.8, 0.9], weight_decay=0).betas == (0.8, 0.9)
