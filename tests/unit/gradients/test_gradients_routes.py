"""Routes one by one: what they keep, in which dtype, and that they own what they keep."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blockllm_cli.gradients.engine import routed
from blockllm_cli.gradients.routes import Dense, Gather, Layerwise, Rows
from blockllm_cli.gradients.sketch import Sketch
from blockllm_cli.optim.entries import Entries


class Holder(nn.Module):
    """Two parameters and a function of them."""

    def __init__(self, function, *shapes):
        super().__init__()
        torch.manual_seed(3)
        self.function = function
        self.values = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self):
        return self.function(*self.values)


WEIGHT = torch.arange(1.0, 17.0).view(4, 4)

# Functions whose parts share gradient buffers within autograd, or get gradients without memory of their own.
SHARING = {
    "same gradient for both": (lambda a, b: ((a + b) * WEIGHT).sum(), (4, 4), (4, 4)),
    "the other is a view": (lambda a, b: ((a + b.view(4, 4)) * WEIGHT).sum(), (4, 4), (16,)),
    "the first is a view": (lambda a, b: ((a.view(4, 4) + b) * WEIGHT).sum(), (16,), (4, 4)),
    "halves of one buffer": (lambda a, b: (torch.cat([a, b]) * torch.cat([WEIGHT, 2 * WEIGHT])).sum(), (4, 4), (4, 4)),
    "expanded": (lambda a, b: a.sum() + 3 * b.sum(), (4, 4), (4, 4)),
    "transposed": (lambda a, b: ((a.t() + b) * WEIGHT).sum(), (4, 4), (4, 4)),
    "used twice": (lambda a, b: ((a + a + b) * WEIGHT).sum(), (4, 4), (4, 4)),
}


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("case", SHARING)
def test_kept_gradients_share_no_memory_and_are_right(case, dtype, passes):
    model = Holder(*SHARING[case])
    wanted = [passes * grad for grad in torch.autograd.grad(model(), list(model.values))]
    routes = {name: Dense(dtype) for name, _ in model.named_parameters()}
    with routed(model, routes):
        for _ in range(passes):
            model().backward()
    kept = [route.result() for route in routes.values()]
    for grad, right in zip(kept, wanted, strict=True):
        assert torch.equal(grad, right.to(grad.dtype))
        assert grad.dtype == (dtype or torch.float32)
        assert grad.is_contiguous()
    # Each may be overwritten without the other noticing, and holds no more memory than itself.
    kept[0].mul_(0.0)
    assert torch.equal(kept[1], wanted[1].to(kept[1].dtype))
    for route, grad in zip(routes.values(), kept, strict=True):
        assert route.held_bytes() == grad.nbytes


def test_the_first_gradient_itself_becomes_the_sum_if_the_dtype_is_equal():
    for dtype in (None, torch.float32):
        gradient, route = torch.ones(3, 2), Dense(dtype)
        route.accept(gradient)
        assert route.result().data_ptr() == gradient.data_ptr()


def test_bf16_gradients_are_summed_in_fp32():
    route = Dense(torch.float32)
    for value in (256.0, 1.0, 1.0):
        route.accept(torch.full((2,), value, dtype=torch.bfloat16))
    assert route.result().dtype == torch.float32
    assert route.result().tolist() == [258.0, 258.0]
    assert route.held_bytes() == 8


def test_in_bf16_they_are_lost_as_in_the_published_protocol():
    route = Dense(torch.bfloat16)
    for value in (256.0, 1.0, 1.0):
        route.accept(torch.full((2,), value, dtype=torch.bfloat16))
    assert route.result().tolist() == [256.0, 256.0]
    assert route.held_bytes() == 4


def test_an_unfed_route_holds_nothing():
    assert Dense().result() is None
    assert Dense().held_bytes() == 0


def entries_of(kind, shape=(6, 4)):
    """A set of entries of each form."""
    count = shape[0] * shape[1]
    return {
        "all": Entries.all(shape),
        "few": Entries.of(torch.tensor([3]), shape),
        "bitmap": Entries.of(torch.arange(0, count, 2), shape),
        "rows": Entries.of(torch.tensor([1, 2, 5]), shape, "row"),
    }[kind]


KINDS = ["all", "few", "bitmap", "rows"]


def values(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), parts=st.integers(1, 4), wide=st.booleans(), within=st.booleans())
def test_gathered_entries_of_the_sum_are_the_sum_of_the_gathered(kind, parts, wide, within):
    entries = entries_of(kind)
    dtype = torch.float32 if wide else None
    route = Rows(2, 8, Gather(entries, dtype)) if within else Gather(entries, dtype)
    gradients = [values(10 if within else 6, 4, seed=part, dtype=torch.float64) for part in range(parts)]
    for gradient in gradients:
        route.accept(gradient)
    whole = sum(gradient[2:8] if within else gradient for gradient in gradients)
    assert route.result().dtype == (dtype or torch.float64)
    assert route.result().shape == (entries.count,)
    torch.testing.assert_close(route.result().double(), entries.gather(whole), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("by_rows", [False, True])
def test_gathered_bf16_is_summed_in_fp32(by_rows):
    entries = entries_of("rows")
    route = Gather(entries, torch.float32)
    for value in (256.0, 1.0, 1.0):
        gradient = torch.full((6, 4), value, dtype=torch.bfloat16)
        if by_rows:
            route.accept_rows(gradient[route.wanted_rows()])
        else:
            route.accept(gradient)
    assert route.result().tolist() == [258.0] * 12
    assert route.held_bytes() == 48


@pytest.mark.parametrize("route_of", [Gather, lambda entries: Rows(0, 6, Gather(entries))], ids=["alone", "in rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_gathered_entries_are_a_copy_that_does_not_hold_the_gradient(kind, route_of):
    gradient = values(9, 4)[:6]
    before = gradient.clone()
    entries, buffer = entries_of(kind), weakref.ref(gradient.untyped_storage())
    route = route_of(entries)
    for _ in range(2):
        route.accept(gradient)
        gradient.zero_()
    assert torch.equal(route.result(), entries.gather(before))
    assert route.result().untyped_storage().nbytes() == route.held_bytes() == 4 * entries.count
    del gradient
    assert buffer() is None


@pytest.mark.parametrize("inner", [Dense, lambda: Gather(Entries.all((3, 4))), lambda: Sketch(5, 0, "w")])
def test_rows_are_fed_as_a_parameter_of_their_own(inner):
    gradient = values(9, 4)
    alone, route = inner(), Rows(4, 7, inner())
    for _ in range(2):
        alone.accept(gradient[4:7].clone())
        route.accept(gradient.clone())
    assert torch.equal(route.result(), alone.result())
    assert route.held_bytes() == alone.held_bytes() > 0
    assert route.result().untyped_storage().nbytes() == route.result().nbytes


def test_rows_say_what_their_route_says():
    assert Rows(2, 5, Dense()).consumes
    assert not Rows(2, 5, Sketch(3, 0, "w")).consumes
    assert Rows(2, 5, Layerwise(lambda gradient: None)).writes
    assert not Rows(2, 5, Dense()).writes
    assert Rows(2, 5, Dense()).wanted_rows() == slice(2, 5)
    assert Rows(10, 20, Rows(2, 5, Dense())).wanted_rows() == slice(12, 15)
    assert Rows(10, 16, Gather(entries_of("rows"))).wanted_rows().tolist() == [11, 12, 15]
    assert Rows(10, 16, Gather(entries_of("bitmap"))).wanted_rows() == slice(10, 16)
    assert Gather(entries_of("few")).wanted_rows() is None


@pytest.mark.parametrize(("start", "stop"), [(3, 3), (4, 3), (-1, 2)])
def test_a_range_without_rows_is_refused(start, stop):
    with pytest.raises(ValueError, match="no range of rows"):
        Rows(start, stop, Dense())


def test_layerwise_hands_on_what_it_gets_and_keeps_nothing():
    gradient, seen = values(6, 4), []
    route = Layerwise(lambda shown: seen.append((shown is gradient, torch.is_grad_enabled())))
    route.accept(gradient)
    assert seen == [(True, False)]
    assert route.result() is None
    assert route.held_bytes() == 0
