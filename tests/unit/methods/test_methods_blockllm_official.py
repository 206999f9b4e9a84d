"""Variant "official" against a recorded run of the released class."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from blockllm_cli.methods.base import PassResult, Rates
from blockllm_cli.methods.blockllm.released import Released
from blockllm_cli.optim.blocks import Piece
from blockllm_cli.optim.entries import Entries
from support.methods import drive_update, make_method, toy_llama

GOLDEN = Path(__file__).parents[2] / "golden" / "blockllm_release.safetensors"
RATE = Rates(0.01, 0.01)


class Recorded(nn.Module):
    """The recorded tensors under their names, with gradients that do not depend on them."""

    def __init__(self, tensors, names):
        super().__init__()
        self.tensors = {name: nn.Parameter(tensors[f"w0.{name}"].clone()) for name in names}

    def named_parameters(self, *_, **__):
        return iter(self.tensors.items())


@pytest.fixture(scope="module")
def recorded():
    with safe_open(GOLDEN, "pt") as file:
        return load_file(GOLDEN), file.metadata()


@pytest.mark.parametrize("variant", ["release", "release_noloss"])
def test_the_recorded_run(recorded, variant, monkeypatch):
    tensors, metadata = recorded
    names = json.loads(metadata["param_order"])
    log = json.loads(metadata[f"{variant}.log"])
    # What the release drew at random is taken from the record; all else follows.
    drawn = {("begin", 0): log[0]["selected"]}
    for entry in log[2:]:
        probe = [name for name in entry["trainable_before"] if name not in log[entry["step"] - 1]["selected"]]
        drawn["probe", entry["step"] - 1] = probe
    monkeypatch.setattr(Released, "_shuffled", lambda self, _, what, step: list(drawn.get((what, step), [])))

    patience = 2 if variant == "release" else 10**6  # without a loss the release never has enough of them
    method = make_method(
        "blockllm",
        variant="official",
        sparsity=0.6,
        update_freq=4,
        patience=patience,
        probe_every=2,
        weight_decay=0.1,
        peak=RATE,
    )
    model = Recorded(tensors, names)
    method.prepare(model)
    last = {name: tensors[f"w0.{name}"] for name in names}
    for step in range(1, 17):
        gradients = {name: tensors[f"grad.{step}.{name}"] for name in names}
        trainable = {name.split("@")[0] for name in next(method.passes(step, RATE)).routes}
        flags = tensors[f"{variant}.trainable_before.{step}"].tolist()
        assert trainable == {name for name, flag in zip(names, flags, strict=True) if flag}
        routes = next(method.passes(step, RATE)).routes
        result = PassResult({key: gradients[key.split("@")[0]].clone() for key in routes}, torch.tensor(0.0))
        chosen = method.choose(step, [result])
        method.update(step, RATE, chosen, float(tensors["losses"][step - 1]))
        selected = tensors[f"{variant}.selected.{step}"].tolist()
        assert set(method.released.selected) == {name for name, flag in zip(names, selected, strict=True) if flag}
        for name, norm, visit in zip(
            names,
            tensors[f"{variant}.grad_norm.{step}"].tolist(),
            tensors[f"{variant}.visit.{step}"].tolist(),
            strict=True,
        ):
            assert method.released.norms.get(name, -1.0) == pytest.approx(norm, rel=1e-6), (step, name)
            assert method.released.visits.get(name, -1.0) == pytest.approx(visit, rel=1e-6), (step, name)
        for name in names:
            if f"{variant}.w.{step}.{name}" in tensors:
                last[name] = tensors[f"{variant}.w.{step}.{name}"]
            torch.testing.assert_close(model.tensors[name].detach(), last[name], atol=3e-7, rtol=0)


def test_what_the_release_lacks_is_refused():
    for key, value in (("mask", "entry"), ("max_interval", 30), ("state", "keep"), ("inactive", "sign")):
        with pytest.raises(ValueError, match=f'variant "official" has no {key}'):
            make_method("blockllm", variant="official", **{key: value})


def test_the_start_takes_a_share_of_the_tensors_and_never_embedding_or_head():
    starts = []
    for seed in range(20):
        method, model = make_method("blockllm", variant="official", sparsity=0.5, seed=seed), toy_llama()
        method.prepare(model)
        starts.append(tuple(method.released.selected))
        assert len(starts[-1]) == int(0.5 * 19)
        assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(starts[-1])
    assert len(set(starts)) > 15


def test_at_least_one_tensor_trains():
    options = {"variant": "official", "sparsity": 0.99, "probe_every": 1, "update_freq": 1, "patience": 1}
    method, model = make_method("blockllm", **options), toy_llama()
    method.prepare(model)
    planned = sum(plan.bytes for plan in method.plan(method._shapes) if plan.category == "optimizer_state")
    for step in range(1, 12):
        drive_update(method, model, step, Rates(0.3, 0.3))
        assert method.released.selected
        assert 0 < sum(each.tensor.nbytes for each in method.held()) <= planned


def test_masked_adam_as_recorded(golden):
    """State for kept entries only: dropped at a new mask, with and without decay; kept with one counter."""
    from blockllm_cli.optim.adam import AdamRule
    from blockllm_cli.optim.kept_state import KeptState
    from blockllm_cli.optim.precision import precision_of

    tensors = golden("blockllm_masked_adam")
    names = [key.removeprefix("w0.") for key in tensors if key.startswith("w0.")]
    for variant, policy, decay in (("drop", "drop", 0.0), ("drop_wd", "drop", 0.1), ("keep_common", "keep", 0.0)):
        rule = AdamRule(weight_decay=decay, decoupled=True)
        state = KeptState(rule, precision_of("fp32"), 0, policy)
        weights = {name: tensors[f"w0.{name}"].clone() for name in names}
        state.attach(weights)
        for step in range(1, 13):
            if step in (1, 7):
                for name in names:
                    positions = tensors[f"mask.{step}.{name}"].reshape(-1).nonzero().view(-1)
                    piece = Piece(name, tuple(weights[name].shape))
                    state.start(piece, Entries.of(positions, piece.shape))
                for record in state.records() if policy == "keep" and step == 7 else ():
                    record.counter = 6  # the recorded run goes on with one counter for all
            before = {name: weight.clone() for name, weight in weights.items()}
            gradients = {
                record.key: record.entries.gather(tensors[f"grad.{step}.{record.piece.parameter}"])
                for record in state.records()
            }
            state.update(gradients, lambda _: 0.01, step)
            mask = 1 if step < 7 else 7
            for name, weight in weights.items():
                rest = ~tensors[f"mask.{mask}.{name}"].bool()
                assert torch.equal(weight[rest], before[name][rest])
                recorded = tensors.get(f"{variant}.w.{step}.{name}")
                if recorded is not None:
                    torch.testing.assert_close(weight, recorded, atol=5e-6, rtol=1e-5)
        for name, records in state.active.items():
            places = torch.cat([record.entries.positions() for record in records])
            moments = torch.cat([record.slots["exp_avg"] for record in records])[places.argsort()]
            wanted = tensors.get(f"{variant}.exp_avg.12.{name}")
            assert wanted is not None
            torch.testing.assert_close(moments, wanted, atol=5e-6, rtol=1e-5)


def test_the_tensor_that_reaches_the_limit_is_left_out_and_nothing_follows():
    released = Released({"a": 30, "b": 20, "c": 10, "d": 40}, 0.5, 2, 1, 0, 1, seed=1)
    assert released.limit == 50
    released.begin()
    released.after_update(1, {"a": 9.0, "b": 8.0, "c": 7.0, "d": 6.0}, 1.0)
    assert released.after_update(2, {}, 2.0)
    assert released.selected == ["a"]


def test_every_draw_of_the_release_has_its_own_key():
    released = Released({f"t{i}": 1 for i in range(8)}, 0.5, 4, 2, 1, 2, seed=1)
    names = list(released.sizes)
    orders = {tuple(released._shuffled(names, what, step)) for what in ("begin", "probe") for step in range(5)}
    assert len(orders) == 10
    assert tuple(released._shuffled(names, "probe", 3)) in orders
