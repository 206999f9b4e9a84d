"""The dense route: what it keeps, in which dtype, and that it owns what it keeps."""

import pytest
import torch
from torch import nn

from blockllm_cli.gradients.engine import routed
from blockllm_cli.gradients.routes import Dense


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
