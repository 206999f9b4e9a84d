"""The linear layer: as torch's without feeds; with feeds, rows of the weight's gradient and nothing else."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from blockllm_cli.model.linears import Linear, pick_columns


class Taker:
    """Adds up the rows of the gradient that it wants."""

    def __init__(self, rows, then=lambda: None):
        self.rows, self.then, self.sum, self.times = rows, then, 0, 0

    def wanted_rows(self):
        return self.rows

    def accept_rows(self, rows):
        self.sum, self.times = self.sum + rows, self.times + 1
        self.then()


IN, OUT = 6, 9


def layer_and_input(shape=(3, 5), dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Linear(IN, OUT).to(dtype), torch.randn(*shape, IN).to(dtype)


ROWS = st.one_of(
    st.tuples(st.integers(0, OUT), st.integers(0, OUT)).map(lambda ends: slice(min(ends), max(ends))),
    st.sets(st.integers(0, OUT - 1)).map(lambda rows: torch.tensor(sorted(rows), dtype=torch.int64)),
)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    rows=st.lists(ROWS, min_size=1, max_size=3),
    needs_input=st.booleans(),
    checkpointed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_takers_get_their_rows_and_the_rest_is_as_ever(shape, rows, needs_input, checkpointed, dtype):
    layer, x = layer_and_input(shape, dtype)
    x.requires_grad_(needs_input)
    plain = F.linear(x, layer.weight)
    plain.square().sum().backward()
    input_gradient, weight_gradient = x.grad, layer.weight.grad
    x.grad = layer.weight.grad = None

    layer.feeds = tuple(Taker(part) for part in rows)
    y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    assert torch.equal(y, plain)
    y.square().sum().backward()
    assert layer.weight.grad is None
    assert x.grad is None if not needs_input else torch.equal(x.grad, input_gradient)
    for taker in layer.feeds:
        assert taker.times == 1
        assert taker.sum.dtype == dtype
        tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(taker.sum, weight_gradient[taker.rows], **tolerance)


def test_without_feeds_it_is_torchs_layer():
    layer, x = layer_and_input()
    usual = nn.Linear(IN, OUT, bias=False)
    usual.load_state_dict(layer.state_dict())
    assert list(layer.state_dict()) == ["weight"]
    assert layer.bias is None
    assert torch.equal(layer(x), usual(x))
    narrow = x.bfloat16()
    assert type(layer.bfloat16()(narrow).grad_fn) is type(usual.bfloat16()(narrow).grad_fn)
    layer.feeds = (Taker(slice(0, 2)),)
    assert list(layer.state_dict()) == ["weight"]


def test_without_gradients_the_feeds_are_not_asked():
    layer, x = layer_and_input()
    layer.feeds = (Taker(slice(0, 2)),)
    with torch.no_grad():
        assert layer(x).grad_fn is None
    assert layer.feeds[0].times == 0


def test_a_taker_may_write_the_weight():
    """Its time comes when the gradient of the input is made, and autograd takes no offence at the new version."""
    layer, x = layer_and_input()
    x.requires_grad_()
    (wanted,) = torch.autograd.grad(F.linear(x, layer.weight).square().sum(), x)

    def zero():
        with torch.no_grad():
            layer.weight.zero_()

    layer.feeds = (Taker(slice(0, OUT), zero), Taker(slice(2, 4), zero))
    layer(x).square().sum().backward()
    assert torch.equal(x.grad, wanted)
    assert layer.weight.abs().sum() == 0
    torch.testing.assert_close(layer.feeds[0].sum[2:4], layer.feeds[1].sum)


def test_each_call_of_a_layer_feeds():
    layer, x = layer_and_input()
    layer.feeds = (Taker(slice(1, 4)),)
    (wanted,) = torch.autograd.grad((F.linear(x, layer.weight) + F.linear(2 * x, layer.weight)).sum(), layer.weight)
    (layer(x) + layer(2 * x)).sum().backward()
    assert layer.feeds[0].times == 2
    torch.testing.assert_close(layer.feeds[0].sum, wanted[1:4])


def test_columns_are_a_view_where_they_can_be():
    matrix = torch.arange(12.0).view(3, 4)
    assert pick_columns(matrix, None) is matrix
    assert pick_columns(matrix, slice(1, 3)).data_ptr() == matrix[:, 1:].data_ptr()
    assert pick_columns(matrix, torch.tensor([0, 3])).tolist() == [[0, 3], [4, 7], [8, 11]]
