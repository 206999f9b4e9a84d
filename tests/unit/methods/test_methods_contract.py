"""What every method must do, whichever it is. The list comes from the registry: a new method is held to it at once."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockllm_cli.errors import InputError
from blockllm_cli.footprint import bytes_by_category
from blockllm_cli.gradients.engine import routed
from blockllm_cli.methods.base import Rates
from blockllm_cli.methods.registry import method_class, method_names
from blockllm_cli.model.config import SIZES
from blockllm_cli.model.roles import DENSE_ROLES, role_of
from support.methods import make_method, run_update, run_updates, toy_batch, toy_config, toy_llama

METHODS = method_names()
PRECISIONS = ["fp32", "bf16", "bf16_master", "bf16_papers"]
RATES = Rates(body=2e-2, dense=1e-2)


def fast(name):
    """Rates at which every tensor of the toy moves within a few updates, in bf16 too."""
    return Rates(body=1.0, dense=10.0) if name == "sgd" else RATES


def prepared(name, *, precision="fp32", tied=False, **keywords):
    method = make_method(name, precision=precision, **keywords)
    model = toy_llama(torch.float32 if precision == "fp32" else torch.bfloat16, tied=tied)
    method.prepare(model)
    return method, model


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        same = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
        assert same, name


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def claimed(name):
    """Parameters that the method says it trains: what its plan holds gradients of."""
    return {p.name for p in make_method(name).plan(toy_config().parameter_shapes()) if p.category == "gradients"}


def test_the_registry_knows_the_dense_methods_and_nothing_else():
    assert {"adam", "adamw", "frozen", "sgd"} <= set(METHODS)
    assert not {"base", "dense", "registry", "resolve", "__init__"} & set(METHODS)


def test_facts_are_honest_and_complete(name):
    kind = method_class(name)
    assert kind.name == name
    for text in (kind.facts.title, kind.facts.summary, kind.facts.paper, kind.facts.family, kind.facts.keeps):
        assert text
    assert set(kind.facts.hyperparameters) <= SIZES.keys()
    for values in kind.facts.hyperparameters.values():
        assert values.learning_rate > 0
        assert values.source.startswith("ours") or re.search(r"arXiv|\d{4}", values.source)
        kind.Options(**values.options)
    for key, field in kind.Options.model_fields.items():
        assert field.description, key
    assert not {"name", "seed"} & kind.Options.model_fields.keys()  # these belong to every method


@pytest.mark.parametrize("precision", PRECISIONS)
def test_descends(name, precision):
    method, model = prepared(name, precision=precision)
    losses = run_updates(method, model, range(1, 61), Rates(0.3, 0.3) if name == "sgd" else RATES)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_claimed_tensor_moves_and_no_other(name, precision, tied):
    """R18"""
    method, model = prepared(name, precision=precision, tied=tied)
    before = weights_of(model)
    run_updates(method, model, range(1, 6), fast(name))
    moved = {key for key, value in weights_of(model).items() if not torch.equal(value, before[key])}
    assert moved == claimed(name) & before.keys()
    assert method.trainable_entries == sum(before[key].numel() for key in moved)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("state_dtype", [None, "bf16", "fp32"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_real_bytes_are_the_planned_bytes(name, precision, state_dtype, micro_batches, tied):
    method, model = prepared(name, precision=precision, tied=tied, micro_batches=micro_batches, state_dtype=state_dtype)
    plan = method.plan(toy_config(tied=tied).parameter_shapes())
    kept = [p for p in plan if p.lifetime == "run"]
    held = list(method.held())
    assert {(h.name, h.category, tuple(h.tensor.shape), f"{h.tensor.dtype}") for h in held} == {
        (p.name, p.category, p.shape, f"torch.{p.dtype}") for p in kept
    }
    assert len({h.tensor.untyped_storage().data_ptr() for h in held}) == len(held)
    real = {}
    for h in held:
        real[h.category] = real.get(h.category, 0) + h.tensor.untyped_storage().nbytes()
    assert real == bytes_by_category(kept)

    (asked,) = method.passes(1, Rates(1e-3, 1e-3))
    with routed(model, asked.routes):
        for _ in range(micro_batches):
            model.loss(toy_batch(1), scale=0.01)[0].backward()
    gradients = {p.name: p for p in plan if p.category == "gradients"}
    assert asked.routes.keys() == gradients.keys()
    for key, route in asked.routes.items():
        assert route.held_bytes() == gradients[key].bytes, key
        assert f"{route.result().dtype}" == f"torch.{gradients[key].dtype}"
    # Nothing grows with use.
    method.update(1, RATES, {key: route.result() for key, route in asked.routes.items()}, 1.0)
    assert sum(h.tensor.untyped_storage().nbytes() for h in method.held()) == sum(p.bytes for p in kept)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_state_dtype_decides_the_dtype_of_the_state(name, precision):
    for word, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        method, _ = prepared(name, precision=precision, state_dtype=word)
        assert {h.tensor.dtype for h in method.held() if h.category == "optimizer_state"} == {dtype}


def test_state_entries_are_the_elements_of_first_moments(name):
    method, _ = prepared(name)
    first = {"sgd": "momentum_buffer"}.get(name, "exp_avg")
    expected = sum(h.tensor.numel() for h in method.held() if h.name.endswith(f".{first}"))
    assert method.state_entries == expected > 0


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(name, precision, rounding, tmp_path):
    """Six updates = two + resume + four; the state goes through both kinds of file."""

    def fresh():
        return prepared(name, precision=precision, rounding=rounding)

    method, model = fresh()
    run_updates(method, model, range(1, 7), RATES)

    first, first_model = fresh()
    run_updates(first, first_model, [1, 2], RATES)
    state = first.state_dict()
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    plain = {key: value for key, value in state.items() if key not in tensors}
    save_file(tensors, tmp_path / "state.safetensors")
    torch.save(state, tmp_path / "state.pt")
    from_torch = torch.load(tmp_path / "state.pt", weights_only=True)
    assert_equal(from_torch, state)

    second, second_model = fresh()
    run_updates(second, second_model, [1], RATES)  # what was there before must not matter
    second_model.load_state_dict(first_model.state_dict())
    addresses = {h.name: h.tensor.data_ptr() for h in second.held()}
    second.load_state_dict({**plain, **load_file(tmp_path / "state.safetensors")})
    assert {h.name: h.tensor.data_ptr() for h in second.held()} == addresses
    assert_equal(second.state_dict(), from_torch)
    run_updates(second, second_model, range(3, 7), RATES)

    assert_equal(weights_of(second_model), weights_of(model))
    assert_equal(second.state_dict(), method.state_dict())


def test_state_keys_are_parameter_names_with_the_state_name(name):
    method, model = prepared(name, precision="bf16_master")
    parameters = dict(model.named_parameters())
    for key, value in method.state_dict().items():
        if isinstance(value, torch.Tensor):
            parameter, _, slot = key.rpartition(".")
            assert parameter in parameters
            assert slot in {"exp_avg", "exp_avg_sq", "momentum_buffer", "master"}
        else:
            assert key == "step"
            assert type(value) is int


def test_loading_is_strict_and_names_the_tensor(name):
    method, _ = prepared(name)
    state = method.state_dict()
    key = next(key for key, value in state.items() if isinstance(value, torch.Tensor) and value.ndim == 2)
    shape = tuple(state[key].shape)
    refused = {
        "missing": {k: v for k, v in state.items() if k != key},
        "extra": {**state, "model.layers.9.mlp.up_proj.weight.exp_avg": torch.zeros(2)},
        "shape": {**state, key: torch.zeros(3, 5)},
        "dtype": {**state, key: state[key].bfloat16()},
        "no tensor": {**state, key: 1.0},
        "step": {**state, "step": "3"},
    }
    messages = {}
    for what, broken in refused.items():
        with pytest.raises(InputError) as caught:
            method.load_state_dict(broken)
        messages[what] = str(caught.value)
    assert repr(key) in messages["missing"]
    assert "model.layers.9.mlp.up_proj.weight.exp_avg" in messages["extra"]
    for text in (key, "(3, 5)", str(shape)):
        assert text in messages["shape"]
    assert "torch.bfloat16" in messages["dtype"]
    assert "torch.float32" in messages["dtype"]
    assert key in messages["no tensor"]
    assert "step" in messages["step"]


@pytest.mark.parametrize("micro_batches", [2, 3, 6])
def test_accumulation_is_the_big_batch(name, micro_batches):
    whole, whole_model = prepared(name)
    cut, cut_model = prepared(name, micro_batches=micro_batches)
    for step in range(1, 5):
        big = run_update(whole, whole_model, step, Rates(1e-3, 1e-3))
        small = run_update(cut, cut_model, step, Rates(1e-3, 1e-3), micro_batches=micro_batches)
        assert small == pytest.approx(big, abs=1e-6)
    for key, value in weights_of(cut_model).items():
        torch.testing.assert_close(value, whole_model.get_parameter(key), atol=1e-5, rtol=0)


def test_the_rate_reaches_every_update_by_role(name):
    """Rate 0 leaves a role's weights unmoved at any step, and the other roles move."""
    for rates, moving in ((Rates(0.0, 1e-2), DENSE_ROLES), (Rates(1e-2, 0.0), {"attention", "mlp"})):
        method, model = prepared(name)
        for step in (1, 2, 3):
            before = weights_of(model)
            run_update(method, model, step, rates)
            moved = {key for key, value in weights_of(model).items() if not torch.equal(value, before[key])}
            assert moved == {key for key in claimed(name) if role_of(key) in moving}


def test_a_rate_that_changes_between_updates_is_used_as_given(name):
    """The first update of the linear rules scales with the rate: twice the rate, twice the change."""
    changes = []
    for rate in (1e-3, 2e-3):
        method, model = prepared(name)
        before = weights_of(model)
        run_update(method, model, 1, Rates(rate, rate))
        changes.append({key: value - before[key] for key, value in weights_of(model).items()})
    for key, change in changes[0].items():
        torch.testing.assert_close(2 * change, changes[1][key], atol=2e-6, rtol=1e-3)


def test_merged_weights_are_the_weights_themselves(name):
    method, model = prepared(name)
    merged = method.merged_weights(model)
    assert {key: value.data_ptr() for key, value in merged.items()} == {
        key: value.data_ptr() for key, value in model.named_parameters()
    }


def test_unchanged_is_known_for_the_update_that_counted_only(name):
    method, model = prepared(name, precision="bf16")
    assert method.unchanged is None
    run_update(method, model, 1, RATES, count_unchanged=True)
    assert 0.0 <= method.unchanged <= 1.0
    run_update(method, model, 2, RATES)
    assert method.unchanged is None  # so that a resumed run, which has counted nothing, says the same
    run_update(method, model, 3, Rates(0.0, 0.0), count_unchanged=True)
    assert method.unchanged == 1.0


@pytest.mark.parametrize("precision", ["fp32", "bf16_master"])
def test_unchanged_is_not_counted_where_no_update_is_lost(name, precision):
    method, model = prepared(name, precision=precision)
    run_update(method, model, 1, RATES, count_unchanged=True)
    assert method.unchanged is None


def test_methods_know_nothing_of_the_global_generators(name):
    method, model = prepared(name, precision="bf16", rounding="stochastic")
    before = torch.get_rng_state()
    run_updates(method, model, [1, 2], RATES)
    assert torch.equal(torch.get_rng_state(), before)
