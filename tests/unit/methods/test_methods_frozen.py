"""The control: only embedding, head and norms learn, at the dense rate, by AdamW."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blockllm_cli.methods.base import Rates
from blockllm_cli.methods.frozen import Frozen
from blockllm_cli.model.roles import role_of
from support.methods import drive_update, make_method, toy_llama


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_keep_every_bit_and_get_no_route(tied):
    method, model = make_method("frozen"), toy_llama(tied=tied)
    method.prepare(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    (asked,) = method.passes(1, Rates(1e-3, 1e-3))
    assert {role_of(name) for name in asked.routes} == {"embedding", "norm"} | (set() if tied else {"head"})
    for step in range(1, 6):
        drive_update(method, model, step, Rates(body=0.5, dense=1e-2))
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value) == (role_of(name) in {"attention", "mlp"}), name


def test_what_learns_learns_as_with_adamw_at_the_dense_rate():
    """The first update of the common parameters is that of adamw; the body rate has no say."""
    models = {}
    for name in ("frozen", "adamw"):
        method, models[name] = make_method(name), toy_llama()
        method.prepare(models[name])
        drive_update(method, models[name], 1, Rates(body=0.0 if name == "adamw" else 7.0, dense=1e-2))
    for name, parameter in models["adamw"].named_parameters():
        assert torch.equal(models["frozen"].get_parameter(name), parameter), name


def test_no_weight_product_is_made_for_the_matrices():
    """The backward pass costs less by exactly the weight-gradient products of attention and MLP."""
    flops = {}
    for name in ("frozen", "adamw"):
        method, model = make_method(name), toy_llama()
        method.prepare(model)
        with FlopCounterMode(display=False) as counter:
            drive_update(method, model, 1, Rates(1e-3, 1e-3))
        flops[name] = counter.get_total_flops()
    entries = sum(p.numel() for name, p in toy_llama().named_parameters() if role_of(name) in {"attention", "mlp"})
    assert flops["adamw"] - flops["frozen"] == 2 * entries * 6 * 12


def test_state_is_a_fraction_of_adamws():
    method = make_method("frozen")
    method.prepare(toy_llama())
    dense = sum(p.numel() for name, p in toy_llama().named_parameters() if role_of(name) not in {"attention", "mlp"})
    assert method.state_entries == method.trainable_entries == dense


def test_its_rate_is_the_dense_rate():
    assert {values.dense_rate for values in Frozen.facts.hyperparameters.values()} >= {1e-2}
    assert Frozen.facts.family == "control"
