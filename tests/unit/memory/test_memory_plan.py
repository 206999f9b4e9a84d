"""The plan of a run: categories, bytes, and that the real run holds exactly that."""

import json

import pytest
import torch

from blockllm_cli.footprint import CATEGORIES
from blockllm_cli.memory.measure import MemoryMeter
from blockllm_cli.memory.plan import PLANNED, plan_run
from blockllm_cli.methods.base import Rates
from blockllm_cli.model.config import SIZES, LlamaConfig
from blockllm_cli.optim.precision import precision_of
from support.methods import drive_update, make_method, toy_config, toy_llama


def planned(name, precision, *, tied=False, **keywords):
    method = make_method(name, precision=precision, **keywords)
    return plan_run(toy_config(tied=tied).parameter_shapes(), method, precision_of(precision))


def entries(config):
    return sum(torch.Size(shape).numel() for shape in config.parameter_shapes().values())


@pytest.mark.parametrize(
    ("name", "precision", "weights", "master", "gradients", "state"),
    [
        ("adamw", "fp32", 4, 0, 4, 8),
        ("adamw", "bf16", 2, 0, 2, 8),
        ("adam", "bf16_master", 2, 4, 4, 8),
        ("adam", "bf16_papers", 2, 0, 2, 4),
        ("sgd", "fp32", 4, 0, 4, 4),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_per_entry_of_each_category(name, precision, weights, master, gradients, state, tied):
    size = entries(toy_config(tied=tied))
    plan = planned(name, precision, tied=tied)
    assert plan.by_category() == {
        **dict.fromkeys(CATEGORIES),
        **dict.fromkeys(("indices", "projectors", "quantization"), 0),
        "weights": weights * size,
        "master_weights": master * size,
        "gradients": gradients * size,
        "optimizer_state": state * size,
    }
    assert plan.total_bytes == (weights + master + gradients + state) * size


def test_several_micro_batches_accumulate_in_fp32_but_for_the_papers():
    size = entries(toy_config())
    assert planned("adamw", "bf16", micro_batches=2).by_category()["gradients"] == 4 * size
    assert planned("adamw", "bf16_papers", micro_batches=2).by_category()["gradients"] == 2 * size


def test_frozen_holds_nothing_for_the_matrices():
    shapes = toy_config().parameter_shapes()
    dense = sum(torch.Size(shape).numel() for name, shape in shapes.items() if "_proj" not in name)
    categories = planned("frozen", "fp32").by_category()
    assert categories["weights"] == 4 * entries(toy_config())
    assert categories["gradients"] == 4 * dense
    assert categories["optimizer_state"] == 8 * dense


def test_sgd_without_momentum_has_no_state():
    assert planned("sgd", "fp32", momentum=0.0).by_category()["optimizer_state"] == 0


def test_json_lists_every_tensor_and_adds_up():
    plan = planned("adamw", "bf16_master")
    table = json.loads(json.dumps(plan.to_json()))
    assert table.keys() == {"categories", "total_bytes", "tensors"}
    assert list(table["categories"]) == list(CATEGORIES)
    assert {name for name, value in table["categories"].items() if value is not None} == set(PLANNED)
    for category in PLANNED:
        assert table["categories"][category] == sum(t["bytes"] for t in table["tensors"] if t["category"] == category)
    assert table["total_bytes"] == sum(t["bytes"] for t in table["tensors"])
    assert {
        "name": "lm_head.weight.exp_avg",
        "category": "optimizer_state",
        "shape": [64, 16],
        "dtype": "float32",
        "lifetime": "run",
        "bytes": 4096,
    } in table["tensors"]
    assert {t["lifetime"] for t in table["tensors"] if t["category"] == "gradients"} == {"update"}


def test_the_papers_adam_memory_of_the_60m_model():
    """58.07M parameters in bf16, weights and two bf16 moments: 0.35 decimal GB, as the SCALE table prints for Adam."""
    config = LlamaConfig(vocab_size=32_000, num_key_value_heads=8, **SIZES["60m"])
    method = make_method("adam", precision="bf16_papers")
    categories = plan_run(config.parameter_shapes(), method, precision_of("bf16_papers")).by_category()
    assert round((categories["weights"] + categories["optimizer_state"]) / 1e9, 2) == 0.35


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_master", "bf16_papers"])
@pytest.mark.parametrize("name", ["adamw", "frozen", "sgd"])
def test_a_real_update_holds_what_was_planned(name, precision, tied, micro_batches):
    method = make_method(name, precision=precision, micro_batches=micro_batches)
    plan = plan_run(toy_config(tied=tied).parameter_shapes(), method, precision_of(precision))
    model = toy_llama(precision_of(precision).weights, tied=tied)
    method.prepare(model)
    meter = MemoryMeter(model, method)

    def mark(routes):
        meter.mark("backward", sum(route.held_bytes() for route in routes.values()))

    drive_update(method, model, 1, Rates(1e-3, 1e-3), micro_batches=micro_batches, between=mark)
    meter.mark("update", 0)
    real = meter.by_category()
    assert {name: real[name] for name in PLANNED} == {name: plan.by_category()[name] for name in PLANNED}
