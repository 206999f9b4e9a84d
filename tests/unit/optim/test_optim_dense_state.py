"""How stored tensors, fp32 arithmetic and rounding go together."""

import pytest
import torch

from blockllm_cli.optim import stored as stored_module
from blockllm_cli.optim.adam import AdamRule
from blockllm_cli.optim.dense_state import DenseState
from blockllm_cli.optim.precision import precision_of

SHAPES = {"a": (50, 33), "b": (7,), "c": (129, 3)}


def made(precision, rounding="nearest", state_dtype=None, seed=0):
    draw = torch.Generator().manual_seed(9)
    held = precision_of(precision, rounding).with_moments(state_dtype)
    weights = {name: torch.randn(shape, generator=draw).to(held.weights) for name, shape in SHAPES.items()}
    state = DenseState(AdamRule(weight_decay=0.1, decoupled=True), held, seed)
    state.allocate(weights)
    return state, weights


def gradients(step, dtype=torch.float32, names=tuple(SHAPES)):
    draw = torch.Generator().manual_seed(step)
    made = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in SHAPES.items()}
    return {name: made[name] for name in names}


def rate_of(name):
    return {"a": 1e-2, "b": 3e-3, "c": 1e-2}[name]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_master", "bf16_papers"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("state_dtype", [None, "bf16", "fp32"])
def test_every_update_is_the_fp32_rule_rounded_once(precision, rounding, state_dtype):
    """Each update is redone in fp32 from what was stored before it; nearest: equal, stochastic: a neighbour."""
    state, weights = made(precision, rounding, state_dtype)
    for step in range(1, 6):
        stored = dict(state.state_dict())
        before = {name: value.clone() for name, value in {**stored, **weights}.items() if name != "step"}
        grads = gradients(step, torch.bfloat16 if precision in ("bf16", "bf16_papers") else torch.float32)
        wanted = {}
        for name in SHAPES:
            weight = before.get(f"{name}.master", before[name]).float().clone()
            moments = [before[f"{name}.{slot}"].float().clone() for slot in ("exp_avg", "exp_avg_sq")]
            AdamRule(weight_decay=0.1, decoupled=True).apply(
                [weight], [grads[name].float()], [[moment] for moment in moments], step=step, lr=rate_of(name)
            )
            wanted |= {name: weight, f"{name}.exp_avg": moments[0], f"{name}.exp_avg_sq": moments[1]}
        state.update(grads, rate_of)
        now = {**state.state_dict(), **weights}
        for name, value in wanted.items():
            result = now[name]
            if result.dtype == torch.float32:
                assert torch.equal(result, value), name
            elif rounding == "nearest":
                assert torch.equal(result, value.bfloat16()), name
            else:
                cut = (value.view(torch.int32) & -(2**16)).view(torch.float32)
                up = ((value.view(torch.int32) & -(2**16)) + 2**16).view(torch.float32)
                assert ((result.float() == cut) | (result.float() == up)).all(), name
                assert value.numel() < 10 or not torch.equal(result, value.bfloat16()), name
            if precision == "bf16_master" and name in SHAPES:
                assert torch.equal(now[f"{name}.master"], value), name
    assert state.state_dict()["step"] == 5


@pytest.mark.parametrize("precision", ["bf16", "bf16_master", "bf16_papers"])
def test_slices_do_not_show_with_nearest_rounding(precision, monkeypatch):
    """Cut in pieces of 32 entries, the update is the same; so the largest tensor does not decide the workspace."""
    runs = []
    for entries in (2**21, 32):
        monkeypatch.setattr(stored_module, "SLICE_ENTRIES", entries)
        state, weights = made(precision)
        for step in range(1, 4):
            state.update(gradients(step), rate_of)
        runs.append({**state.state_dict(), **weights})
    for name, value in runs[0].items():
        assert value == runs[1][name] if name == "step" else torch.equal(value, runs[1][name]), name


def test_the_workspace_is_bounded_by_the_slice(monkeypatch):
    """No tensor that the update makes is larger than a slice, whatever the size of the weights."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(stored_module, "SLICE_ENTRIES", 64)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, (list, tuple)) else [made]:
                # A view shares the storage of the stored tensor and is no workspace.
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in stored:
                    largest.append(tensor.numel())
            return made

    for precision, rounding in (("bf16", "nearest"), ("bf16", "stochastic"), ("bf16_master", "stochastic")):
        state, weights = made(precision, rounding)
        grads = gradients(1)
        tensors = [t for t in (*state.state_dict().values(), *weights.values(), *grads.values()) if torch.is_tensor(t)]
        stored = {t.untyped_storage().data_ptr() for t in tensors}
        with Watch():
            state.update(grads, rate_of, count_unchanged=True)
        assert 1 < max(largest) <= 64


def test_many_small_tensors_are_widened_in_bounded_groups(monkeypatch):
    monkeypatch.setattr(stored_module, "SLICE_ENTRIES", 100)
    groups = []

    class Watched(AdamRule):
        def apply(self, weights, gradients, slots, *, step, lr):
            groups.append(sum(weight.numel() for weight in weights))
            super().apply(weights, gradients, slots, step=step, lr=lr)

    names = [f"n{index}" for index in range(12)]
    state = DenseState(Watched(), precision_of("bf16"), 0)
    state.allocate({name: torch.ones(30, dtype=torch.bfloat16) for name in names})
    state.update({name: torch.ones(30) for name in names}, lambda _: 1e-3)
    assert groups == [90] * 4


def test_masters_start_as_the_weights():
    state, weights = made("bf16_master")
    for name, weight in weights.items():
        master = state.state_dict()[f"{name}.master"]
        assert master.dtype == torch.float32
        assert torch.equal(master, weight.float())


def test_equal_tensors_of_different_names_are_rounded_by_different_draws():
    state = DenseState(AdamRule(), precision_of("bf16", "stochastic"), 0)
    weights = {name: torch.ones(500, dtype=torch.bfloat16) for name in "ab"}
    state.allocate(weights)
    state.update({name: torch.ones(500) for name in "ab"}, lambda _: 1e-3)
    assert not torch.equal(weights["a"], weights["b"])


def test_a_weight_without_gradient_keeps_its_value_and_moments():
    state, weights = made("fp32")
    state.update(gradients(1), rate_of)
    before = {name: value.clone() for name, value in {**state.state_dict(), **weights}.items() if name != "step"}
    state.update(gradients(2, names=("a", "c")), rate_of)
    now = {**state.state_dict(), **weights}
    for name, value in before.items():
        assert torch.equal(now[name], value) == name.startswith("b"), name
    assert state.state_dict()["step"] == 2


def test_the_order_of_gradients_does_not_matter_to_stochastic_draws():
    runs = []
    for names in (("a", "b", "c"), ("c", "b", "a")):
        state, weights = made("bf16", "stochastic")
        state.update(gradients(1, names=names), rate_of)
        runs.append(weights)
    for name in SHAPES:
        assert torch.equal(runs[0][name], runs[1][name])
    state, weights = made("bf16", "stochastic", seed=1)
    state.update(gradients(1), rate_of)
    assert not torch.equal(weights["a"], runs[0]["a"])


def test_the_unchanged_share_is_that_of_the_entries():
    state = DenseState(AdamRule(), precision_of("bf16"), 0)
    weights = {"a": torch.full((30,), 100.0).bfloat16(), "b": torch.zeros(10).bfloat16()}
    state.allocate(weights)
    # 1e-3 is lost on 100 and seen on 0.
    share = state.update({"a": torch.ones(30), "b": torch.ones(10)}, lambda _: 1e-3, count_unchanged=True)
    assert float(share) == 0.75
    assert state.update({"a": torch.ones(30)}, lambda _: 1e-3) is None


@pytest.mark.parametrize("weight", [torch.zeros(4, 3).t(), torch.zeros(3, dtype=torch.float64)])
def test_a_weight_it_cannot_write_is_refused(weight):
    with pytest.raises(ValueError, match="w is torch"):
        DenseState(AdamRule(), precision_of("fp32"), 0).allocate({"w": weight})


def test_fp32_runs_on_whole_tensors_without_copies():
    """One call of the rule per rate, on the stored tensors themselves."""
    calls = []

    class Watched(AdamRule):
        def apply(self, weights, gradients, slots, *, step, lr):
            calls.append((lr, [weight.data_ptr() for weight in weights], [grad.data_ptr() for grad in gradients]))
            super().apply(weights, gradients, slots, step=step, lr=lr)

    weights = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    state = DenseState(Watched(), precision_of("fp32"), 0)
    state.allocate(weights)
    grads = gradients(1)
    state.update(grads, rate_of)
    assert calls == [
        (1e-2, [weights[n].data_ptr() for n in "ac"], [grads[n].data_ptr() for n in "ac"]),
        (3e-3, [weights["b"].data_ptr()], [grads["b"].data_ptr()]),
    ]
