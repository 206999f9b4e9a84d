"""BlockLLM against dense Adam, against itself cut in two, and against its own promises."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockllm_cli.errors import GuardError, RecipeError
from blockllm_cli.footprint import bytes_by_category
from blockllm_cli.gradients.routes import Dense
from blockllm_cli.gradients.sketch import sketch_bytes
from blockllm_cli.methods.base import Rates
from blockllm_cli.methods.blockllm import choosing
from blockllm_cli.model.batch import Batch
from blockllm_cli.model.llama import build_model
from support.methods import drive_update, make_method, toy_config, toy_llama

RATES = Rates(body=1e-2, dense=2e-2)
DENSE = {"sparsity": 0.0, "norms": "always", "always": ()}
SELECTIVE = {"sparsity": 0.8, "patience": 4, "max_interval": 9}
MASKED = {"mask": "entry", "density": 0.3}
ROWS = 8


def small_llama(dtype=torch.float32):
    return build_model(toy_config(layers=4), seed=3, dtype=dtype)


def small_batch(step, rows=slice(None)):
    draw = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(64, (ROWS, 9), generator=draw)
    ids[:, 1::2] = ids[:, 0:-1:2]
    ids = ids[rows]
    targets = ids[:, 1:].reshape(-1)
    return Batch(ids[:, :-1].contiguous(), None, torch.arange(targets.numel()), targets)


def drive(method, model, step, **keywords):
    keywords = {"batch": small_batch, "rows": ROWS, **keywords}
    return drive_update(method, model, step, keywords.pop("rates", RATES), **keywords)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name], name


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize(
    ("precision", "rounding"),
    [
        ("fp32", "nearest"),
        ("bf16", "nearest"),
        ("bf16", "stochastic"),
        ("bf16_master", "nearest"),
        ("bf16_papers", "nearest"),
    ],
)
def test_with_nothing_sparse_it_is_adamw_to_the_bit(precision, rounding, clip):
    updates = 200 if rounding == "nearest" and precision in ("fp32", "bf16") else 40
    runs = {}
    for name, options in (("adamw", {}), ("blockllm", DENSE)):
        method = make_method(name, precision=precision, rounding=rounding, weight_decay=0.1, **options)
        model = toy_llama(torch.float32 if precision == "fp32" else torch.bfloat16)
        method.prepare(model)
        runs[name] = [drive_update(method, model, step, RATES, clip=clip) for step in range(1, updates + 1)]
        runs[name, "weights"] = weights(model)
        runs[name, "state"] = {
            (held.name.split("@")[0].removesuffix(f".{slot}"), slot): held.tensor.reshape(-1)
            for held in method.held()
            for slot in [held.name.rpartition(".")[2]]
        }
    assert [(each.loss, each.norm) for each in runs["adamw"]] == [(each.loss, each.norm) for each in runs["blockllm"]]
    equal(runs["adamw", "weights"], runs["blockllm", "weights"])
    equal(runs["adamw", "state"], runs["blockllm", "state"])


OPTIONS = {
    "whole": {},
    "paper": {"variant": "paper", "max_interval": 9},
    "entries": MASKED,
    "rows": {"mask": "row", "density": 0.4},
    "layer": {"granularity": "layer", "sparsity": 0.6},
    "keep": {**MASKED, "state": "keep", "patience": 12, "max_interval": 15},
    "offload": {**MASKED, "state": "offload", "patience": 12, "max_interval": 15},
    "waves": {"mask": "entry", "density": 0.05, "sparsity": 0.95},
    "random": {"score": "random"},
    "cyclic": {"score": "cyclic", "norms": "compete", "always": ()},
    "normalized": {"inactive": "normalized"},
    "sign with masks": {"inactive": "sign", **MASKED},
    "slices": {"always": (), "sparsity": 0.97},
    "groups": {"groups": ("q_proj|k_proj|v_proj", "mlp"), "sparsity": 0.5},
    "official": {"variant": "official", "update_freq": 5, "patience": 2, "probe_every": 3, "sparsity": 0.6},
}


def options_of(case):
    chosen = OPTIONS[case]
    return chosen if chosen.get("variant") == "official" else {**SELECTIVE, **chosen}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize(("precision", "rounding"), [("fp32", "nearest"), ("bf16_master", "stochastic")])
def test_a_run_cut_twice_is_the_unbroken_one(case, precision, rounding, tmp_path):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16

    def begin():
        method = make_method("blockllm", precision=precision, rounding=rounding, **options_of(case))
        model = small_llama(dtype)
        method.prepare(model)
        return method, model

    whole, model = begin()
    seen = [drive(whole, model, step) for step in range(1, 91)]
    assert sum(event["kind"] == "selection" for each in seen for event in each.events) >= (
        1 if case == "official" else 3
    )
    again, other = begin()
    done = 0
    for upto in (25, 56, 90):
        for step in range(done + 1, upto + 1):
            assert drive(again, other, step) == seen[step - 1], step
        done = upto
        saved, kept = again.state_dict(), weights(other)
        save_file({name: value for name, value in saved.items() if torch.is_tensor(value)}, tmp_path / "state")
        plain = json.loads(json.dumps({name: value for name, value in saved.items() if not torch.is_tensor(value)}))
        again, other = begin()
        other.load_state_dict(kept)
        again.load_state_dict({**load_file(tmp_path / "state"), **plain})
    equal(weights(model), weights(other))
    equal(whole.state_dict(), again.state_dict())


@pytest.mark.parametrize("case", OPTIONS)
def test_an_update_that_was_given_up_leaves_no_trace(case):
    method, model = make_method("blockllm", **options_of(case)), small_llama()
    method.prepare(model)
    for step in range(1, 13):
        before = copy.deepcopy(method.state_dict())
        if OPTIONS[case].get("inactive") is None:
            passes = method.passes(step, RATES)
            next(passes)
            equal(before, method.state_dict())
        drive(method, model, step)


@pytest.mark.parametrize("inactive", ["sign", "normalized"])
@pytest.mark.parametrize("mask", [{}, MASKED, {"mask": "row", "density": 0.3}])
@pytest.mark.parametrize(("precision", "rounding"), [("fp32", "nearest"), ("bf16", "stochastic")])
def test_layerwise_or_not_is_the_same_r03(inactive, mask, precision, rounding):
    found = []
    for layerwise in (True, False):
        method = make_method(
            "blockllm",
            precision=precision,
            rounding=rounding,
            inactive=inactive,
            layerwise=layerwise,
            **SELECTIVE,
            **mask,
        )
        model = small_llama(torch.float32 if precision == "fp32" else torch.bfloat16)
        method.prepare(model)
        runs = [drive(method, model, step) for step in range(1, 25)]
        found.append((runs, weights(model)))
    assert found[0][0] == found[1][0]
    equal(found[0][1], found[1][1])


def test_layerwise_goes_without_with_several_micro_batches_and_changes_nothing():
    runs = {}
    for micro_batches in (1, 4):
        method = make_method("blockllm", micro_batches=micro_batches, inactive="normalized", **SELECTIVE)
        model = small_llama()
        method.prepare(model)
        for step in range(1, 13):
            drive(method, model, step, micro_batches=micro_batches)
        runs[micro_batches] = weights(model)
    for name, value in runs[1].items():
        torch.testing.assert_close(value, runs[4][name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [case for case in OPTIONS if case != "official"])
def test_a_batch_may_be_cut_into_micro_batches(case):
    losses, events = {}, {}
    for micro_batches in (1, 4):
        method = make_method("blockllm", micro_batches=micro_batches, **options_of(case))
        model = small_llama()
        method.prepare(model)
        driven = [drive(method, model, step, micro_batches=micro_batches) for step in range(1, 31)]
        losses[micro_batches] = [each.loss for each in driven]
        events[micro_batches] = [
            (step, event["cause"], [block["name"] for block in event["blocks"]])
            for step, each in enumerate(driven, 1)
            for event in each.events
        ]
    flips = [pair for pair in zip(events[1], events[4], strict=True) if pair[0] != pair[1]]
    assert not flips, f"a near tie fell otherwise: {flips[0]}"
    assert losses[1] == pytest.approx(losses[4], abs=2e-5)


@pytest.mark.parametrize("case", ["whole", "entries", "rows", "paper", "waves", "keep", "slices", "layer"])
@pytest.mark.parametrize("sparsity", [0.9, 0.95])
def test_gradients_and_state_stay_within_the_budget_r17(case, sparsity):
    options = {**options_of(case), "sparsity": sparsity}
    if case == "layer":
        options["sparsity"] = 0.7
    method, model = make_method("blockllm", micro_batches=4, **options), small_llama()
    method.prepare(model)
    layout = method.chooser.layout
    always = sum(piece.size for piece in layout.always) + sum(layout.shapes[name][0] for name in layout.riders)
    planned = sum(plan.bytes for plan in method.plan(layout.shapes) if plan.category == "gradients")
    state = []
    for step in range(1, 41):
        held = []

        def note(routes, held=held):
            held.append(sum(route.held_bytes() for route in routes.values()))

        drive(method, model, step, micro_batches=4, between=note)
        assert max(held) <= planned
        state.append(sum(each.tensor.numel() for each in method.held() if each.category == "optimizer_state"))
        candidates = {piece.key for block in layout.blocks for piece in block.pieces}
        assert method._state.active_entries(candidates) <= layout.budget
    factor = 2 if case == "keep" else 1
    assert max(state) <= 2 * (always + factor * layout.budget)


def test_a_steady_update_holds_the_kept_entries_and_one_sketch():
    method, model = make_method("blockllm", micro_batches=4, **{**SELECTIVE, **MASKED, "patience": 50}), small_llama()
    method.prepare(model)
    for step in range(1, 6):
        drive(method, model, step, micro_batches=4)
    seen = []

    def note(routes):
        held = {}
        for key, route in routes.items():
            held.setdefault("sketch" if key.endswith("@sketch") else "kept", []).append(route)
        assert not [key for key in routes if isinstance(routes[key], Dense) and "layers" in key and "norm" not in key]
        seen.append({what: sum(route.held_bytes() for route in those) for what, those in held.items()})

    drive(method, model, 6, micro_batches=4, between=note)
    assert {each["kept"] for each in seen} == {4 * method._state.entries}
    assert max(each.get("sketch", 0) for each in seen) <= sketch_bytes(24 * 16)


@pytest.mark.parametrize("case", ["whole", "paper", "entries", "rows", "layer", "waves", "slices", "groups"])
@pytest.mark.parametrize("precision", ["fp32", "bf16_master"])
def test_the_plan_of_a_selection_is_exact(case, precision):
    options = {**options_of(case), "patience": 40, "max_interval": 0}
    method = make_method("blockllm", precision=precision, micro_batches=2, **options)
    model = small_llama(torch.float32 if precision == "fp32" else torch.bfloat16)
    method.prepare(model)
    for step in range(1, 36):
        drive(method, model, step, micro_batches=2)
        if not method.chooser.waiting:
            break
    assert not method.chooser.waiting
    planned = bytes_by_category(method.plan_selection())
    gradients = []

    def note(routes):
        gradients.append(sum(route.held_bytes() for key, route in routes.items() if not key.endswith("@sketch")))

    drive(method, model, step + 1, micro_batches=2, between=note)
    held = {"gradients": max(gradients)}
    for each in method.held():
        held[each.category] = held.get(each.category, 0) + each.tensor.nbytes
    assert held == planned


@pytest.mark.parametrize("inactive", ["sign", "normalized"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_block_with_a_gradient_that_is_not_finite_stays_and_is_reported(inactive, precision):
    method = make_method("blockllm", precision=precision, inactive=inactive, **SELECTIVE)
    model = small_llama(torch.float32 if precision == "fp32" else torch.bfloat16)
    method.prepare(model)
    drive(method, model, 1)
    name = next(block.name for block in method.chooser.layout.blocks if block.name not in method.chooser.trained)
    passes = method.passes(2, RATES)
    routes = next(passes).routes
    before = weights(model)
    gradient = torch.full_like(before[name], 1.0)
    gradient.view(-1)[3] = float("nan")
    routes[f"{name}@inactive"].accept(gradient)
    assert torch.equal(model.get_parameter(name), before[name])
    assert not torch.isfinite(method._norms[name])
    method._norms = {name: method._norms[name]}
    assert method._unmoved_events() == [{"kind": "nonfinite", "pieces": [name]}]


def test_more_state_than_the_budget_ends_the_run(monkeypatch):
    monkeypatch.setattr(choosing, "take_whole", lambda order, sizes, limit: list(order))
    method, model = make_method("blockllm", **SELECTIVE), small_llama()
    method.prepare(model)
    before = weights(model)
    with pytest.raises(GuardError, match=rf"the budget is {method.chooser.layout.budget}"):
        drive(method, model, 1)
    equal(before, weights(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "row", "density": 0.001}, "less than one row would be kept; lower sparsity, or raise density"),
        ({"sparsity": 0.99999, "norms": "compete"}, "less than all would be kept"),
        ({"always": (".",)}, "nothing to select"),
        ({"always": ("attenton",)}, "'attenton' finds no parameter"),
        ({"groups": ("q_proj", "q_proj")}, "before it does not"),
    ],
)
def test_options_that_fit_no_shape_are_refused_when_planned(options, message):
    method = make_method("blockllm", **options)
    with pytest.raises(RecipeError, match=message):
        method.plan({name: tuple(value.shape) for name, value in small_llama().named_parameters()})


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("key", ["inactive_scale", "weight_decay", "eps"])
def test_numbers_are_finite(key, value):
    with pytest.raises(ValueError, match=key):
        make_method("blockllm", inactive="sign", **{key: value})


def test_row_masks_of_small_blocks_never_end_a_run():
    options = {"variant": "paper", "mask": "row", "sparsity": 0.995, "density": 0.2, "score": "cyclic"}
    method, model = make_method("blockllm", max_interval=1, **options), small_llama()
    method.prepare(model)
    for step in range(1, 41):
        (event,) = [each for each in drive(method, model, step).events if each["kind"] == "selection"]
        assert 0 < event["kept"] <= event["budget"]


@pytest.mark.parametrize("mask", [{}, MASKED])
def test_an_update_that_was_skipped_leaves_no_gradient_behind(mask):
    method = make_method("blockllm", micro_batches=4, inactive="sign", **SELECTIVE, **mask)
    method.prepare(small_llama())
    method._dense = {"left": torch.ones(3)}
    next(method.passes(1, RATES))
    assert not method._dense
