from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from blockllm_cli.model.loss import CHUNK_BYTES, chunk_tokens, chunked_nll, token_nll


class Allocations(TorchDispatchMode):
    """Counts the elements of the largest storage that any operator returned, and notes shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not any(alias_info(func)):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
                self.shapes.add(tuple(tensor.shape))
        return result


def alias_info(func):
    return [value.alias_info is not None for value in func._schema.returns]


def problem(tokens, width=16, vocab=50, dtype=torch.float32, seed=0, spread=1.0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=draw).to(dtype)
    head = (torch.randn(vocab, width, generator=draw) * spread).to(dtype)
    return hidden, head, torch.randint(vocab, (tokens,), generator=draw)


def plain(hidden, head, targets, scale):
    """Loss, and gradients of hidden states and head, through full logits in the dtype of `hidden`, the rest in fp32."""
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    logits = hidden @ head.t()
    wide = logits.float() if logits.dtype == torch.bfloat16 else logits
    loss = F.cross_entropy(wide, targets, reduction="sum") * scale
    loss.backward()
    return loss.detach(), hidden.grad, head.grad


def chunked(hidden, head, targets, scale, chunk=None):
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    loss, total = chunked_nll(hidden, head, targets, scale=scale, chunk=chunk)
    assert not total.requires_grad
    torch.testing.assert_close(loss.double(), total * scale, rtol=1e-6, atol=0)
    loss.backward()
    return loss.detach(), hidden.grad, head.grad


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    width=st.integers(1, 24),
    vocab=st.integers(1, 70),
    chunk=st.none() | st.integers(1, 50),
    seed=st.integers(0, 2**16),
)
def test_fp32_value_and_gradients_are_those_of_full_logits(tokens, width, vocab, chunk, seed):
    inputs = problem(tokens, width, vocab, seed=seed)
    exact = plain(inputs[0].double(), inputs[1].double(), inputs[2], 0.25)
    for made, true in zip(chunked(*inputs, 0.25, chunk), exact, strict=True):
        torch.testing.assert_close(made.double(), true, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("chunk", [None, 1, 7, 64, 256])
@pytest.mark.parametrize("spread", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("likeliest", [False, True], ids=["random targets", "likeliest targets"])
def test_bf16_is_no_further_from_the_truth_than_full_logits(chunk, spread, likeliest):
    hidden, head, targets = problem(256, 64, 500, torch.bfloat16, spread=spread)
    inputs = hidden, head, (hidden.float() @ head.float().t()).argmax(1) if likeliest else targets
    exact = plain(inputs[0].double(), inputs[1].double(), inputs[2], 1 / 256)
    usual, ours = plain(*inputs, 1 / 256), chunked(*inputs, 1 / 256, chunk)
    assert [value.dtype for value in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert (ours[0] - exact[0]).abs() <= (usual[0] - exact[0]).abs() + 1e-6
    for made, other, true in zip(ours[1:], usual[1:], exact[1:], strict=True):
        assert (made.double() - true).norm() <= 1.02 * (other.double() - true).norm()


def test_bf16_gradients_of_confident_tokens_keep_their_precision():
    """Logits that bf16 holds exactly, targets of likelihood 0.96: softmax - 1 is not rounded as 0.96 is."""
    hidden, head = torch.eye(16).repeat(4, 1).bfloat16(), (6 * torch.eye(16)).bfloat16()
    targets = torch.arange(16).repeat(4)
    exact = plain(hidden.double(), head.double(), targets, 1.0)
    for made, true in zip(chunked(hidden, head, targets, 1.0, chunk=16), exact, strict=True):
        assert (made.double() - true).norm() < 3e-3 * true.norm()


def test_losses_far_from_zero_stay_finite_and_exact():
    hidden, head, targets = torch.tensor([[200.0], [-200.0]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 1])
    loss, hidden_gradient, _ = chunked(hidden, head, targets, 1.0)
    assert loss == 400.0
    assert hidden_gradient.tolist() == [[2.0], [0.0]]


def test_no_token_gives_zero_and_zero_gradients():
    loss, hidden_gradient, head_gradient = chunked(*problem(0), 1.0)
    assert loss == 0
    assert hidden_gradient.shape == (0, 16)
    assert torch.equal(head_gradient, torch.zeros(50, 16))


def test_the_upstream_factor_is_respected():
    hidden, head, targets = problem(9)
    hidden.requires_grad_()
    head.requires_grad_()
    (3.0 * chunked_nll(hidden, head, targets, scale=0.5, chunk=4)[0]).backward()
    _, hidden_gradient, head_gradient = plain(hidden, head, targets, 1.5)
    torch.testing.assert_close(hidden.grad, hidden_gradient)
    torch.testing.assert_close(head.grad, head_gradient)


def test_gradients_are_handed_out_once():
    hidden, head, targets = problem(3)
    loss, _ = chunked_nll(hidden.requires_grad_(), head, targets, scale=1.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out once"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [4, 64], ids=["chunks", "one chunk"])
def test_the_heads_gradient_is_not_copied_on_its_way(dtype, chunk):
    hidden, head, targets = problem(16, dtype=dtype)
    head = torch.nn.Parameter(head)
    loss, _ = chunked_nll(hidden, head, targets, scale=1.0, chunk=chunk)
    made = loss.grad_fn.gradients[1][0].data_ptr()
    loss.backward()
    assert head.grad.data_ptr() == made


def test_a_tied_head_adds_to_the_embeddings_gradient():
    _, weight, targets = problem(12)
    ids = torch.arange(12)

    def gradient(loss_of):
        parameter = torch.nn.Parameter(weight.clone())
        loss_of(F.embedding(ids, parameter).tanh(), parameter).backward()
        return parameter.grad

    ours = gradient(lambda hidden, head: chunked_nll(hidden, head, targets, scale=1.0, chunk=5)[0])
    usual = gradient(lambda hidden, head: F.cross_entropy(hidden @ head.t(), targets, reduction="sum"))
    torch.testing.assert_close(ours, usual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["train", "frozen head", "evaluate"])
def test_full_logits_never_exist(dtype, mode):
    tokens, width, vocab, chunk = 60, 8, 400, 8
    hidden, head, targets = problem(tokens, width, vocab, dtype)
    hidden.requires_grad_(mode != "evaluate")
    head.requires_grad_(mode == "train")
    with Allocations() as seen:
        loss, _ = chunked_nll(hidden, head, targets, scale=1.0, chunk=chunk)
        if mode != "evaluate":
            loss.backward()
    assert vocab * chunk // 2 < seen.largest <= vocab * chunk < tokens * vocab
    assert ((vocab, width) in seen.shapes) == (mode == "train")


@pytest.mark.parametrize(("mode", "products"), [("train", 3), ("frozen head", 2), ("frozen body", 2), ("evaluate", 1)])
@pytest.mark.parametrize("chunk", [8, 64], ids=["chunks", "one chunk"])
def test_only_the_products_that_are_needed_are_made(mode, products, chunk):
    tokens, width, vocab = 32, 8, 50
    hidden, head, targets = problem(tokens, width, vocab)
    hidden.requires_grad_(mode in ("train", "frozen head"))
    head.requires_grad_(mode in ("train", "frozen body"))
    with FlopCounterMode(display=False) as flops:
        loss, _ = chunked_nll(hidden, head, targets, scale=1.0, chunk=chunk)
        if mode != "evaluate":
            loss.backward()
    assert flops.get_total_flops() == products * 2 * tokens * width * vocab


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_value_is_computed(off):
    hidden, head, targets = problem(32, 8, 50)
    head.requires_grad_()
    expected = plain(hidden, head, targets, 0.5)[0]
    with off(), FlopCounterMode(display=False) as flops:
        loss, total = chunked_nll(hidden, head, targets, scale=0.5, chunk=8)
    assert flops.get_total_flops() == 2 * 32 * 8 * 50
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(total, 2 * expected.double(), rtol=1e-6, atol=0)


def test_token_losses_do_not_depend_on_the_partition():
    """R04: the loss of a token is the same whatever it is computed beside."""
    hidden, head, targets = problem(40, 32, 300)
    whole = token_nll(hidden, head, targets)
    expected = F.cross_entropy(hidden @ head.t(), targets, reduction="none")
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)
    for rows in (1, 4, 7, 32):
        parts = [
            token_nll(hidden[i : i + rows], head, targets[i : i + rows], chunk=3) for i in range(0, len(targets), rows)
        ]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


def test_a_head_of_zeros_gives_the_logarithm_of_the_vocabulary():
    """R05: with the head set to zero the perplexity is the vocabulary size."""
    hidden, head, targets = problem(30, vocab=70)
    losses = token_nll(hidden, torch.zeros_like(head), targets)
    torch.testing.assert_close(losses.double().mean().exp().item(), 70.0, rtol=1e-6, atol=0)


def test_a_chunk_is_as_long_as_its_bytes_allow():
    assert chunk_tokens(32_000, 2) == CHUNK_BYTES // 64_000
    assert chunk_tokens(2**40, 4) == 1


class Taker:
    """Keeps the rows of the head's gradient that it wants."""

    def __init__(self, rows):
        self.rows, self.taken = rows, []

    def wanted_rows(self):
        return self.rows

    def accept_rows(self, rows):
        self.taken.append(rows)


def fed(hidden, head, targets, scale, rows, chunk=None, *, needs_hidden=True):
    hidden, head = hidden.detach().requires_grad_(needs_hidden), head.detach().requires_grad_()
    takers = [Taker(part) for part in rows]
    loss, _ = chunked_nll(hidden, head, targets, scale=scale, chunk=chunk, feeds=takers)
    assert not any(taker.taken for taker in takers)
    loss.backward()
    assert head.grad is None
    assert [len(taker.taken) for taker in takers] == [1] * len(takers)
    return loss.detach(), hidden.grad, [taker.taken[0] for taker in takers]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    numbers=st.sets(st.integers(0, 29)),
    ends=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    chunk=st.none() | st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_fed_rows_are_those_of_the_whole_gradient(tokens, numbers, ends, chunk, dtype, seed):
    inputs = problem(tokens, 8, 30, dtype, seed=seed)
    rows = [torch.tensor(sorted(numbers), dtype=torch.int64), slice(min(ends), max(ends)), slice(0, 30)]
    loss, hidden_gradient, head_gradient = chunked(*inputs, 0.25, chunk)
    made = fed(*inputs, 0.25, rows, chunk)
    assert torch.equal(made[0], loss)
    assert torch.equal(made[1], hidden_gradient)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for part, taken in zip(rows, made[2], strict=True):
        assert taken.dtype == dtype
        torch.testing.assert_close(taken, head_gradient[part], **tolerance)


@pytest.mark.parametrize("chunk", [None, 1, 7, 64, 256])
@pytest.mark.parametrize("spread", [0.02, 1.0])
def test_fed_rows_in_bf16_are_no_further_from_the_truth_than_full_logits(chunk, spread):
    hidden, head, targets = problem(256, 64, 500, torch.bfloat16, spread=spread)
    rows = [slice(100, 350), torch.arange(0, 500, 3)]
    exact = plain(hidden.double(), head.double(), targets, 1 / 256)[2]
    usual = plain(hidden, head, targets, 1 / 256)[2].double()
    for part, taken in zip(rows, fed(hidden, head, targets, 1 / 256, rows, chunk)[2], strict=True):
        assert (taken.double() - exact[part]).norm() <= 1.02 * (usual[part] - exact[part]).norm()


@pytest.mark.parametrize("chunk", [8, 64], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("needs_hidden", [False, True])
def test_only_the_rows_that_are_wanted_are_multiplied(chunk, needs_hidden):
    tokens, width, vocab = 32, 8, 50
    inputs = problem(tokens, width, vocab)
    with FlopCounterMode(display=False) as flops:
        fed(*inputs, 1.0, [slice(3, 7), torch.tensor([1, 4, 9])], chunk, needs_hidden=needs_hidden)
    assert flops.get_total_flops() == 2 * tokens * width * (vocab * (2 if needs_hidden else 1) + 4 + 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_other_rows_never_exists(dtype):
    tokens, width, vocab = 60, 8, 400
    hidden, head, targets = problem(tokens, width, vocab, dtype)
    with Allocations() as seen:
        fed(hidden, head, targets, 1.0, [slice(100, 150)], chunk=8)
    assert (50, width) in seen.shapes
    assert (vocab, width) not in seen.shapes


def test_fed_rows_respect_the_upstream_factor():
    hidden, head, targets = problem(9)
    taker = Taker(slice(5, 20))
    loss, _ = chunked_nll(hidden, head.requires_grad_(), targets, scale=0.5, chunk=4, feeds=[taker])
    (3.0 * loss).backward()
    torch.testing.assert_close(taker.taken[0], plain(hidden, head, targets, 1.5)[2][5:20])
