"""Both ways of feeding on a Llama: equal results, fewer products, writes in the backward pass, nothing left over."""

import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blockllm_cli.gradients.engine import routed
from blockllm_cli.gradients.routes import Dense, Gather, Layerwise, Route, Rows
from blockllm_cli.gradients.sketch import Sketch, signs
from blockllm_cli.model.batch import Batch
from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.linears import Linear
from blockllm_cli.model.llama import build_model
from blockllm_cli.optim.entries import Entries

LENGTH, VOCABULARY, HIDDEN, INNER = 8, 40, 16, 24
UP, DOWN, QUERY, HEAD = (
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "lm_head.weight",
)


def llama(*, tied=False, dtype=torch.float32, checkpointed=False):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return build_model(config, seed=1, dtype=dtype, checkpoint_activations=checkpointed)


IDS = torch.randint(VOCABULARY, (4, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def rows_loss(model, start=0, stop=4):
    ids = IDS[start:stop]
    count = (stop - start) * LENGTH
    batch = Batch(ids[:, :-1].contiguous(), None, torch.arange(count), ids[:, 1:].flatten())
    return model.loss(batch, scale=1 / IDS[:, 1:].numel())[0]


def run(model, routes, borders=(0, 4), feeding="auto"):
    """Losses of the micro-batches that end at `borders`, after feeding `routes`."""
    losses = []
    with routed(model, routes, feeding=feeding):
        for start, stop in pairwise(borders):
            loss = rows_loss(model, start, stop)
            loss.backward()
            losses.append(loss.detach())
    return losses


def dense_gradients(model, borders=(0, 4)):
    routes = {name: Dense() for name, _ in model.named_parameters()}
    run(model, routes, borders)
    return {name: route.result() for name, route in routes.items()}


def linear_weights(model):
    names = {name + ".weight": module for name, module in model.named_modules() if isinstance(module, Linear)}
    return {name: module.weight for name, module in names.items()}


def routes_of_rows(model):
    """Routes that want some rows, of every kind, for every linear layer; several on one parameter."""
    routes = {}
    for name, weight in linear_weights(model).items():
        rows, width = weight.shape
        half = rows // 2
        some = Entries.of(torch.arange(1, half * width, 3), (half, width))
        routes |= {
            f"{name}@gather": Rows(half, 2 * half, Gather(some)),
            f"{name}@sketch": Rows(half, 2 * half, Sketch(7, 0, name)),
            f"{name}@dense": Rows(half, 2 * half, Dense()),
            f"{name}@numbers": Gather(Entries.of(torch.tensor([0, 2, half, rows - 1]), (rows, width), "row"), None),
            f"{name}@inner": Rows(1, 6, Gather(Entries.of(torch.tensor([0, 3]), (5, width), "row"))),
        }
    return routes


def relative(made, wanted):
    return float((made.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_both_ways_give_the_same(tied, checkpointed, dtype, tolerance):
    model = llama(tied=tied, dtype=dtype, checkpointed=checkpointed)
    borders = (0, 1, 4)
    wanted = dense_gradients(model, borders)
    by_layer, by_hook = routes_of_rows(model), routes_of_rows(model)
    assert len(by_layer) == 5 * (14 if tied else 15)
    losses = [run(model, by_layer, borders), run(model, by_hook, borders, "hook")]
    assert losses[0] == losses[1]
    for key, route in by_layer.items():
        name = key.partition("@")[0]
        assert relative(route.result(), by_hook[key].result()) <= tolerance, key
        if key.endswith("dense"):
            half = len(wanted[name]) // 2
            assert relative(route.result(), wanted[name][half : 2 * half]) <= tolerance
        if key.endswith("inner"):
            assert relative(route.result(), wanted[name][[1, 4]].flatten()) <= tolerance


def is_fed_by_hook(model, name):
    return bool(model.get_parameter(name)._post_accumulate_grad_hooks)


def test_a_layer_feeds_only_if_no_route_wants_the_whole_gradient():
    model = llama()
    routes = {
        f"{UP}@a": Rows(0, 3, Dense()),
        f"{UP}@b": Sketch(3, 0, UP),
        f"{DOWN}@a": Rows(0, 3, Dense()),
        f"{DOWN}@b": Rows(3, 9, Dense()),
        QUERY: Dense(),
    }
    with routed(model, routes):
        assert [is_fed_by_hook(model, name) for name in (UP, DOWN, QUERY)] == [True, False, True]
        assert len(model.model.layers[1].mlp.down_proj.feeds) == 2
        assert not model.model.layers[1].mlp.up_proj.feeds
    with routed(model, routes, feeding="hook"):
        assert is_fed_by_hook(model, DOWN)
        assert not model.model.layers[1].mlp.down_proj.feeds


def test_the_weight_of_an_embedding_is_fed_by_hook_even_if_a_linear_layer_has_it_too():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.project, self.embed = Linear(4, 9), nn.Embedding(9, 4)
            self.embed.weight = self.project.weight

        def forward(self, ids):
            return self.project(self.embed(ids)).square().sum()

    model, ids = Shared(), torch.arange(9)
    (wanted,) = torch.autograd.grad(model(ids), model.project.weight)
    route = Rows(2, 5, Dense())
    with routed(model, {"project.weight": route}):
        model(ids).backward()
    torch.testing.assert_close(route.result(), wanted[2:5])


@pytest.mark.parametrize("tied", [False, True])
def test_the_logits_feed_the_head_too(tied):
    model = llama(tied=tied)
    name = "model.embed_tokens.weight" if tied else HEAD
    route = Rows(3, 9, Dense())
    (wanted,) = torch.autograd.grad(model(IDS).square().sum(), model.head_weight)
    with routed(model, {name: route}):
        model(IDS).square().sum().backward()
    torch.testing.assert_close(route.result(), wanted[3:9])


def counted(model, routes, feeding="auto"):
    with FlopCounterMode(display=False) as counter:
        run(model, routes, feeding=feeding)
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "width"), [(UP, HIDDEN), (HEAD, HIDDEN)])
def test_only_the_wanted_rows_are_multiplied(name, width):
    model, tokens = llama(), IDS[:, 1:].numel()
    rows = len(model.get_parameter(name))
    numbers = torch.tensor([0, 3, rows - 1])
    product = 2 * tokens * width
    whole = counted(model, {name: Dense()})
    assert counted(model, {name: Rows(2, 7, Dense())}) == whole - (rows - 5) * product
    assert counted(model, {name: Rows(2, 7, Dense())}, "hook") == whole
    assert counted(model, {name: Gather(Entries.of(numbers, (rows, width), "row"))}) == whole - (rows - 3) * product
    # What two routes want alike is made once, what is not alike is not.
    shared = {f"{name}@a": Rows(2, 7, Sketch(5, 0, name)), f"{name}@b": Rows(2, 7, Dense())}
    assert counted(model, shared) == whole - (rows - 5) * product
    apart = {f"{name}@a": Rows(2, 7, Sketch(5, 0, name)), f"{name}@b": Rows(7, 8, Dense())}
    assert counted(model, apart) == whole - (rows - 6) * product


def test_no_product_is_made_for_a_frozen_layer():
    """The embedding is routed, so that the backward pass goes all the way."""
    model, tokens = llama(), IDS[:, 1:].numel()
    none = counted(model, {"model.embed_tokens.weight": Dense()})
    some = counted(model, {"model.embed_tokens.weight": Dense(), DOWN: Rows(0, 2, Dense())})
    assert some - none == 2 * tokens * 2 * INNER


def saved_inputs(model, routes, layer):
    """Whether the backward pass keeps the input of `layer`."""
    inputs, saved = [], []  # kept alive: memory that is used again would be mistaken for the same tensor

    def pack(tensor):
        saved.append(tensor.detach())
        return tensor

    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    with routed(model, routes), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rows_loss(model).backward()
    handle.remove()
    return inputs[0].data_ptr() in {tensor.data_ptr() for tensor in saved}


def test_the_input_is_saved_only_where_a_route_needs_it():
    """What the gated activation makes is kept by nobody but the projection after it."""
    model = llama()
    layer, others = model.model.layers[1].mlp.down_proj, {QUERY: Rows(0, 2, Dense())}
    assert not saved_inputs(model, others, layer)
    assert saved_inputs(model, others | {DOWN: Rows(0, 2, Dense())}, layer)


def test_a_layer_whose_input_needs_no_gradient_feeds():
    """The first projection, with the embedding and the norm before it frozen."""
    model = llama()
    wanted = dense_gradients(model)[QUERY]
    route = Rows(4, 9, Dense())
    run(model, {QUERY: route})
    assert relative(route.result(), wanted[4:9]) <= 1e-6


@pytest.mark.parametrize("rows_only", [False, True])
def test_checkpointing_over_frozen_first_layers_loses_no_gradient(rows_only):
    """R19: with the first layer and the embedding frozen nothing before the last layer needs a gradient."""
    kept = {}
    for checkpointed in (False, True):
        model = llama(checkpointed=checkpointed)
        routes = {name: Rows(0, 5, Dense()) if rows_only else Dense() for name in (UP, DOWN)}
        run(model, routes)
        kept[checkpointed] = [route.result() for route in routes.values()]
    for plain, checkpointed in zip(kept[False], kept[True], strict=True):
        assert plain.norm() > 0
        assert torch.equal(plain, checkpointed)


@settings(max_examples=12, deadline=None)
@given(cuts=st.sets(st.integers(1, 3)), feeding=st.sampled_from(["auto", "hook"]), tied=st.booleans())
def test_no_route_depends_on_the_cut_of_the_batch(cuts, feeding, tied):
    """R01 for all routes that accumulate."""
    model = llama(tied=tied)

    def kept(borders):
        routes = routes_of_rows(model)
        routes["model.embed_tokens.weight@dense"] = Dense()
        routes["model.embed_tokens.weight@sketch"] = Sketch(11, 0, "embed")
        run(model, routes, borders, feeding)
        return {key: route.result() for key, route in routes.items()}

    whole, parts = kept((0, 4)), kept((0, *sorted(cuts), 4))
    for key, value in whole.items():
        assert relative(parts[key], value) < 3e-6, key


@pytest.mark.parametrize("in_rows", [False, True], ids=["hook", "layer"])
@pytest.mark.parametrize("name", [DOWN, HEAD])
def test_three_routes_on_one_parameter_each_get_the_gradient(name, in_rows):
    """The layer-wise one overwrites it, and is served last whatever its place."""
    model = llama()
    weight = model.get_parameter(name)
    start, stop = (2, 11) if in_rows else (0, len(weight))
    wanted = dense_gradients(model)[name][start:stop]
    before = weight.detach().clone()
    entries = Entries.of(torch.arange(0, wanted.numel(), 2), tuple(wanted.shape))

    def write(gradient):
        weight[start:stop].sub_(gradient)
        gradient.fill_(float("nan"))

    inner = {"@update": Layerwise(write), "@kept": Gather(entries), "@norm": Sketch(wanted.numel(), 3, name)}
    routes = {name + label: Rows(start, stop, route) if in_rows else route for label, route in inner.items()}
    run(model, routes)
    torch.testing.assert_close(routes[f"{name}@kept"].result(), entries.gather(wanted), rtol=1e-5, atol=1e-7)
    signed = wanted.flatten() * signs(3, name, wanted.numel(), wanted.numel())
    torch.testing.assert_close(routes[f"{name}@norm"].result(), signed, rtol=1e-5, atol=1e-7)
    before[start:stop] -= wanted
    torch.testing.assert_close(weight.detach(), before, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("slices", [1, 2], ids=["hook", "layer"])
def test_writing_inside_the_backward_pass_is_writing_after_it(checkpointed, tied, slices):
    """Every parameter moves far, as soon as its gradient is there; two passes, so a second forward sees the first."""
    rate, model, twin = 3.0, llama(tied=tied, checkpointed=checkpointed), llama(tied=tied, checkpointed=checkpointed)

    def writer(rows):
        return Layerwise(lambda gradient: rows.sub_(rate * gradient))

    routes = {}
    for name, parameter in model.named_parameters():
        size = -(-len(parameter) // slices)
        for start in range(0, len(parameter), size):
            stop = min(start + size, len(parameter))
            part = writer(parameter.detach()[start:stop])
            routes[f"{name}@{start}"] = part if slices == 1 else Rows(start, stop, part)
    assert all(route.writes for route in routes.values())
    for _ in range(2):
        run(model, routes)
        gradients = dense_gradients(twin)
        for name, parameter in twin.named_parameters():
            parameter.detach().sub_(rate * gradients[name])
    for made, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


class Watching(Route):
    """Remembers how many of the gradients shown so far are still alive when the next one comes."""

    def __init__(self, seen, rows=None):
        self.seen, self.rows, self.alive = seen, rows, []

    def wanted_rows(self):
        return self.rows

    def accept(self, gradient):
        self.alive.append(sum(reference() is not None for reference in self.seen))
        self.seen.append(weakref.ref(gradient))

    accept_rows = accept

    def result(self):
        return None

    def held_bytes(self):
        return 0


@pytest.mark.parametrize("rows", [None, slice(0, 2)], ids=["hook", "layer"])
def test_one_gradient_is_in_flight_at_a_time(rows):
    model, seen = llama(), []
    names = [name for name in linear_weights(model) if name != HEAD]
    routes = {name: Watching(seen, rows) for name in names}
    run(model, routes, (0, 2, 4))
    assert len(seen) == 2 * len(names)
    assert {count for route in routes.values() for count in route.alive} == {0}


def test_after_a_pass_only_what_routes_hold_is_there():
    model, seen = llama(), []
    routes = {name: Watching(seen, slice(1, 3)) for name in linear_weights(model)}
    run(model, routes)
    assert not any(reference() is not None for reference in seen)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.feeds == () for module in model.modules() if isinstance(module, Linear))


class Failing(Watching):
    def accept_rows(self, gradient):
        raise ValueError("cannot take it")


@pytest.mark.parametrize("name", [DOWN, HEAD])
def test_a_route_that_fails_leaves_nothing_behind(name):
    model = llama()
    with pytest.raises(ValueError, match="cannot take it"):
        run(model, {name: Failing([], slice(0, 2)), UP: Rows(0, 2, Dense())})
    assert all(module.feeds == () for module in model.modules() if isinstance(module, Linear))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize(
    "routes",
    [
        {UP: Dense(), f"{UP}@b": Dense()},
        {UP: Dense(), f"{UP}@b": Layerwise(print)},
        {UP: Dense(), f"{UP}@b": Rows(3, 4, Layerwise(print))},
        {f"{UP}@a": Rows(2, 6, Layerwise(print)), f"{UP}@b": Rows(0, 3, Dense())},
    ],
    ids=["two sums", "sum and update", "a part", "overlap"],
)
@pytest.mark.parametrize("feeding", ["auto", "hook"])
def test_two_owners_of_one_gradient_are_refused_before_anything_is_touched(routes, feeding):
    model = llama()
    with pytest.raises(ValueError, match="for themselves"):
        run(model, routes, feeding=feeding)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("feeding", ["auto", "hook"])
def test_rows_beside_each_other_may_have_owners_of_their_own(feeding):
    """In any order, and each holds its rows alone."""
    model, lower, upper = llama(), Rows(3, 8, Dense()), Rows(0, 3, Dense())
    wanted = dense_gradients(model)[UP]
    run(model, {f"{UP}@lower": lower, f"{UP}@upper": upper}, (0, 1, 4), feeding)
    assert relative(torch.cat([upper.result(), lower.result()]), wanted[:8]) < 1e-6
    assert [upper.held_bytes(), lower.held_bytes()] == [3 * HIDDEN * 4, 5 * HIDDEN * 4]


def test_rows_that_a_parameter_does_not_have_are_refused():
    model = llama()
    with pytest.raises(ValueError, match=f"rows 20 to 25 of {UP}, which has 24"):
        run(model, {UP: Rows(20, 25, Dense())})


def test_a_label_begins_at_the_first_at_sign():
    model = llama()
    route = Dense()
    run(model, {f"{UP}@rows@1:2": route})
    assert route.result().shape == (INNER, HIDDEN)
    with pytest.raises(KeyError, match="'nothing'"):
        run(model, {"nothing@here": Dense()})
