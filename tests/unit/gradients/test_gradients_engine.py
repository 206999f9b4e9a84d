"""Routes on a model: what they receive, what autograd leaves out, and that nothing of them stays."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blockllm_cli.gradients.engine import routed
from blockllm_cli.gradients.routes import Dense, Route


class Net(nn.Module):
    """Embedding, two layers, and a head that may be the embedding."""

    def __init__(self, *, tied=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8, dtype=dtype)
        self.first = nn.Linear(8, 8, bias=False, dtype=dtype)
        self.second = nn.Linear(8, 8, bias=False, dtype=dtype)
        self.head = nn.Linear(8, 11, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(self.embed(ids))))))


def loss(model, ids):
    return F.cross_entropy(model(ids).float(), ids.flip(0), reduction="sum")


IDS = torch.randint(11, (24,), generator=torch.Generator().manual_seed(1))


def plain_gradients(model, ids=IDS):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss(model, ids), parameters), strict=True))


def dense(model, dtype=None):
    return {name: Dense(dtype) for name, _ in model.named_parameters()}


def left_over(model):
    hooks = [p for p in model.parameters() if p._post_accumulate_grad_hooks or p._backward_hooks]
    return hooks + [p for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("tied", [False, True])
def test_dense_routes_receive_autograds_gradients(tied):
    """A tied parameter gets one gradient, the sum of both uses."""
    model = Net(tied=tied)
    wanted = plain_gradients(model)
    routes = dense(model)
    with routed(model, routes):
        loss(model, IDS).backward()
    assert routes.keys() == wanted.keys()
    assert ("head.weight" in routes) != tied
    for name, route in routes.items():
        assert torch.equal(route.result(), wanted[name])


def test_a_subset_is_routed_and_the_rest_is_frozen():
    model = Net()
    wanted = plain_gradients(model)
    routes = {"second.weight": Dense()}
    with routed(model, routes):
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["second.weight"]
        loss(model, IDS).backward()
        assert all(p.grad is None for p in model.parameters())
    assert torch.equal(routes["second.weight"].result(), wanted["second.weight"])


def test_a_route_that_no_gradient_reached_has_no_result():
    model = Net()
    routes = dense(model)
    with routed(model, routes):
        model.second.weight.sum().backward()
    assert [name for name, route in routes.items() if route.result() is not None] == ["second.weight"]
    assert routes["first.weight"].held_bytes() == 0


def counted_flops(model, routed_names):
    with routed(model, {name: Dense() for name in routed_names}), FlopCounterMode(display=False) as counter:
        loss(model, IDS).backward()
    return counter.get_total_flops()


def test_no_product_is_made_for_a_frozen_parameter():
    """With the head alone, the backward pass is its one weight product; each deeper weight adds its own."""
    model = Net()
    rows = IDS.numel()
    forward = 2 * rows * (8 * 8 + 8 * 8 + 8 * 11)
    head, layer = 2 * rows * 8 * 11, 2 * rows * 8 * 8
    assert counted_flops(model, ["head.weight"]) == forward + head
    assert counted_flops(model, ["second.weight"]) == forward + head + layer
    assert counted_flops(model, ["second.weight", "head.weight"]) == forward + 2 * head + layer
    assert counted_flops(model, ["first.weight"]) == forward + head + layer + layer


def test_the_input_of_a_frozen_layer_is_not_saved():
    model = Net()

    def saved_bytes(names):
        kept = {}

        def pack(tensor):
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with (
            routed(model, {name: Dense() for name in names}),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            x = torch.randn(24, 8)
            y = model.second(model.first(x))
            inputs = x.data_ptr()
            seen = inputs in kept
            y.sum().backward()
        return seen

    assert saved_bytes(["first.weight"])
    assert not saved_bytes(["second.weight"])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_found(fails):
    model = Net()
    model.first.weight.requires_grad_(False)
    model.second.weight.grad = torch.ones(8, 8)  # left by somebody: must not leak into the route
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    wanted = plain_gradients(Net())
    routes = {"first.weight": Dense(), "second.weight": Dense()}
    try:
        with routed(model, routes):
            loss(model, IDS).backward()
            assert torch.equal(routes["second.weight"].result(), wanted["second.weight"])
            if fails:
                raise RuntimeError("in the middle")
    except RuntimeError:
        assert fails
    assert left_over(model) == []
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_a_route_that_fails_in_its_hook_leaves_nothing_behind():
    class Failing(Route):
        def accept(self, gradient):
            raise ValueError("cannot take it")

        def result(self):
            return None

        def held_bytes(self):
            return 0

    model = Net()
    with pytest.raises(ValueError, match="cannot take it"), routed(model, {"second.weight": Failing()}):
        loss(model, IDS).backward()
    assert left_over(model) == []
    assert all(p.requires_grad for p in model.parameters())


def test_a_route_for_no_parameter_is_refused_before_anything_is_touched():
    model = Net()
    with pytest.raises(KeyError, match=r"lm_head\.weight"), routed(model, {"lm_head.weight": Dense()}):
        pass
    assert left_over(model) == []


def test_passes_can_follow_each_other_with_other_routes():
    model = Net()
    wanted = plain_gradients(model)
    for name in ("first.weight", "head.weight", "embed.weight"):
        route = Dense()
        with routed(model, {name: route}):
            loss(model, IDS).backward()
        assert torch.equal(route.result(), wanted[name])


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, 23)), st.booleans())
def test_the_sum_does_not_depend_on_the_cut_of_the_batch(cuts, tied):
    """Any cut into contiguous micro-batches: the sum of the whole, to rounding."""
    model = Net(tied=tied, dtype=torch.float64)

    def part_loss(start, stop):
        return F.cross_entropy(model(IDS[start:stop]), IDS.flip(0)[start:stop], reduction="sum") / IDS.numel()

    sums = []
    for borders in ([0, 24], [0, *sorted(cuts), 24]):
        routes = dense(model)
        with routed(model, routes):
            for start, stop in pairwise(borders):
                part_loss(start, stop).backward()
        sums.append({name: route.result() for name, route in routes.items()})
    for name, value in sums[0].items():
        torch.testing.assert_close(sums[1][name], value, atol=1e-14, rtol=1e-12)
