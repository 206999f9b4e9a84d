"""What an update of BlockLLM multiplies and what it keeps for the backward pass: nothing for what does not train."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blockllm_cli.gradients.engine import routed
from blockllm_cli.methods.base import Rates
from blockllm_cli.methods.blockllm import BlockLLM
from support.methods import LENGTH, ROWS, drive_update, make_method, toy_batch, toy_config, toy_llama

RATES = Rates(1e-3, 1e-3)
TOKENS = ROWS * LENGTH

HEAD, EMBEDDING, FINAL_NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


def depths() -> dict[str, int]:
    """Every parameter of the toy model in the order in which a forward pass meets it; those side by side are equal."""
    found = {EMBEDDING: 0}
    for layer in range(toy_config().num_hidden_layers):
        stages = (
            ("input_layernorm",),
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("post_attention_layernorm",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        )
        for stage, names in enumerate(stages, 1):
            found.update({f"model.layers.{layer}.{name}.weight": 10 * (layer + 1) + stage for name in names})
    return found | {FINAL_NORM: 1000, HEAD: 1001}


def expected_flops(trained: dict[str, int]) -> int:
    """2 per target and weight used forward, above the lowest tensor trained, and trained; norms and look-ups are free.

    Args:
        trained: parameter -> entries of it whose gradient is made.
    """
    shapes, order = toy_config().parameter_shapes(), depths()
    assert order.keys() == shapes.keys()
    matrices = {name: prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name != EMBEDDING}
    lowest = min(order[name] for name in trained)
    above = sum(size for name, size in matrices.items() if order[name] > lowest)
    made = sum(entries for name, entries in trained.items() if name in matrices)
    return 2 * TOKENS * (sum(matrices.values()) + above + made)


def trained_entries(method: BlockLLM, event: dict, always: tuple[str, ...]) -> dict[str, int]:
    """Parameter -> entries that train in an update without selection or probe, by the words of the event alone."""
    shapes = toy_config().parameter_shapes()
    trained: dict[str, int] = {name: prod(shapes[name]) for name in always}
    layers = set()
    for block in event["blocks"]:
        whole, _, _ = block["name"].partition("@")
        names = [name for name in shapes if name == whole or name.startswith(f"{whole}.")]
        for name in names if whole.count(".") < 3 else [whole]:
            if "norm" in name:
                continue
            share = block["kept"] / block["size"]
            size = block["size"] if "@" in block["name"] else prod(shapes[name])
            trained[name] = trained.get(name, 0) + round(share * size)
            layers.add(name.split(".")[2] if ".layers." in name else None)
    for layer in layers - {None}:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            trained[f"model.layers.{layer}.{norm}.weight"] = toy_config().hidden_size
    if HEAD in trained:
        trained[FINAL_NORM] = toy_config().hidden_size
    return trained


DEFAULT = (EMBEDDING, HEAD)


@pytest.mark.parametrize("score", ["cyclic", "norm"])
@pytest.mark.parametrize(
    ("always", "options"),
    [
        (DEFAULT, {"sparsity": 0.5}),
        (DEFAULT, {"sparsity": 0.9}),
        (DEFAULT, {"sparsity": 0.95}),
        ((), {"sparsity": 0.5, "always": ()}),
        ((), {"sparsity": 0.7, "always": ()}),
        ((), {"sparsity": 0.9, "always": ()}),
        (DEFAULT, {"sparsity": 0.5, "granularity": "layer"}),
        ((), {"sparsity": 0.6, "granularity": "layer", "always": ()}),
        ((HEAD,), {"sparsity": 0.6, "granularity": "layer", "always": ("head",)}),
        (DEFAULT, {"sparsity": 0.8, "mask": "row", "density": 0.5}),
    ],
)
def test_the_products_of_an_update_are_those_of_what_it_trains(score, always, options):
    """Of updates that neither select nor let blocks enter, scout or probe; attention multiplies nothing of weights."""
    model = toy_llama()
    method = make_method("blockllm", score=score, max_interval=6, probe=0, patience=100, **options)
    method.prepare(model)
    event: dict = {}
    lowest = set()
    for step in range(1, 25):
        with FlopCounterMode(display=False) as counter:
            driven = drive_update(method, model, step, RATES)
        made = [each for each in driven.events if each["kind"] == "selection"]
        event = made[0] if made else event
        if any(step <= block["enters"] for block in event["blocks"]):
            continue
        trained = trained_entries(method, event, always)
        lowest.add(min(depths()[name] for name in trained))
        expected = expected_flops(trained)
        assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9), (step, sorted(trained))
    if score == "cyclic" and always == () and "granularity" not in options:
        assert len(lowest) > 1, "the lowest block must have changed"


def test_probing_and_scouting_cost_the_products_of_what_they_look_at():
    model = toy_llama()
    shapes = toy_config().parameter_shapes()
    method = make_method("blockllm", sparsity=0.5, probe=1, probe_every=2, max_interval=0)
    method.prepare(model)
    everything = {name: prod(shape) for name, shape in shapes.items()}
    flops = []
    for step in (1, 2, 3, 4):
        with FlopCounterMode(display=False) as counter:
            events = drive_update(method, model, step, RATES).events
        flops.append(counter.get_total_flops())
        if step == 1:
            steady = expected_flops(trained_entries(method, events[0], DEFAULT))
            others = {2 * TOKENS * block["size"] for block in events[0]["others"]}
            # The first pass looks at all candidates, none of which is below the first layer's query projection.
            candidates = {name: size for name, size in everything.items() if "_proj" in name}
    assert flops[0] == pytest.approx(steady + expected_flops(candidates), rel=0.01)
    assert flops[2] == pytest.approx(steady, rel=0.01)
    for probing in (flops[1], flops[3]):
        assert probing - flops[2] in others


def saved_by(method: BlockLLM, model: torch.nn.Module, step: int) -> set[int]:
    """Addresses of the storages that the forward pass of update `step` keeps for its backward pass."""
    saved: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    routes = next(method.passes(step, RATES)).routes
    with routed(model, routes), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.loss(toy_batch(step), scale=1.0)
    return saved


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_the_input_of_a_linear_is_kept_for_what_trains_only(sparsity):
    """The output projection is left out: its input is the attention's output, which attention keeps for itself."""
    model = toy_llama()
    method = make_method("blockllm", sparsity=sparsity, score="cyclic", probe=0, max_interval=3, always=("head",))
    method.prepare(model)
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("_proj") and not name.endswith("o_proj"):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({f"{name}.weight": args[0]}))
    seen = {True: 0, False: 0}
    event: dict = {}
    for step in range(1, 13):
        made = [each for each in drive_update(method, model, step, RATES).events if each["kind"] == "selection"]
        event = made[0] if made else event
        if step % 3 == 0:  # the next update selects
            continue
        saved = saved_by(method, model, step + 1)
        trained = set(trained_entries(method, event, (HEAD,)))
        for value in {id(each): each for each in inputs.values()}.values():
            users = {name for name, each in inputs.items() if each is value}
            is_kept = value.untyped_storage().data_ptr() in saved
            assert is_kept == bool(users & trained), (step, users)
            seen[is_kept] += 1
    assert min(seen.values()) > 0


def test_nothing_below_the_lowest_trained_block_is_kept_for_the_backward_pass():
    """Where a layer above the first is the lowest that trains, the forward pass of the first keeps not a tensor."""
    model = toy_llama()
    method = make_method("blockllm", sparsity=0.9, score="cyclic", probe=0, max_interval=1, always=())
    method.prepare(model)
    counted, first_layer = [0], [0]
    model.model.layers[0].register_forward_hook(lambda *_: first_layer.__setitem__(0, counted[0]))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        counted[0] += 1
        return tensor

    seen = set()
    for step in range(1, 30):
        asked = next(method.passes(step, RATES))
        trained = {key.partition("@")[0] for key in asked.routes}
        counted[0] = 0
        with routed(model, asked.routes), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.loss(toy_batch(step), scale=1.0)
        is_above = min(depths()[name] for name in trained) > 20
        assert (first_layer[0] == 0) == is_above, sorted(trained)
        seen.add(is_above)
        drive_update(method, model, step, RATES)
    assert seen == {True, False}
