"""The sketch: its signs, its linearity, and how well it tells a norm."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockllm_cli.gradients.sketch import SIZE, Sketch, signs, sketched_norm_squared

ROWS, COLUMNS = 256, 512


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(gradient, size, seed, key):
    """Buckets as the definition has them, in float64."""
    flat = gradient.flatten().double()
    signed = flat * signs(seed, key, flat.numel(), size)
    padded = torch.cat([signed, signed.new_zeros(-flat.numel() % size)])
    return padded.view(-1, size).sum(0)


def sketched(gradient, size, seed=0, key="w"):
    route = Sketch(size, seed, key)
    route.accept(gradient)
    return route


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 60), min_size=1, max_size=2),
    size=st.integers(1, 200),
    seed=st.integers(0, 2**63),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_entry_i_goes_to_bucket_i_mod_size_with_its_sign(shape, size, seed, dtype):
    gradient = draw(*shape, dtype=dtype)
    kept = sketched(gradient, size, seed).result()
    assert kept.shape == (size,)
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept.double(), plain(gradient, size, seed, "w"), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [2**17 - 1, 2**17 + 1021, 2**18 + 77])
def test_many_slices_are_as_one(numel, dtype):
    """Just as many rows as a slice has, one more, and a last row that is shorter."""
    gradient = draw(numel, dtype=dtype)
    torch.testing.assert_close(
        sketched(gradient, SIZE).result().double(), plain(gradient, SIZE, 0, "w"), rtol=1e-5, atol=1e-4
    )


@settings(max_examples=30, deadline=None)
@given(parts=st.integers(1, 6), numel=st.integers(1, 300), size=st.integers(1, 64), scale=st.floats(-4, 4, width=32))
def test_is_linear(parts, numel, size, scale):
    """R01: what is kept of the sum is the sum of what is kept, so micro-batches do not matter."""
    gradients = [draw(numel, seed=part) for part in range(parts)]
    route = Sketch(size, 1, "w")
    for gradient in gradients:
        route.accept(scale * gradient)
    whole = scale * torch.stack(gradients).sum(0)
    torch.testing.assert_close(route.result(), sketched(whole, size, seed=1).result(), rtol=1e-5, atol=1e-4)


def test_bf16_gradients_are_summed_in_fp32():
    route = Sketch(1, 0, "w")
    for value in (256.0, 1.0, 1.0):
        route.accept(torch.full((1,), value, dtype=torch.bfloat16))
    assert abs(route.result().item()) == 258.0


@pytest.mark.parametrize("numel", [1, SIZE - 1, SIZE])
def test_as_many_buckets_as_entries_is_exact(numel):
    gradient = draw(numel)
    norm = sketched(gradient, SIZE).norm_squared().sqrt()
    assert norm.dtype == torch.float64
    torch.testing.assert_close(norm, gradient.double().norm(), rtol=1e-6, atol=0)


def only(rows=slice(None), columns=slice(None)):
    gradient = torch.zeros(ROWS, COLUMNS)
    gradient[rows, columns] = draw(ROWS, COLUMNS)[rows, columns]
    return gradient


STRUCTURES = {
    "random": draw(ROWS, COLUMNS),
    "rank 1": draw(ROWS, 1) @ draw(1, COLUMNS, seed=1),
    "rank 3": draw(ROWS, 3) @ draw(3, COLUMNS, seed=1),
    "equal entries": torch.ones(ROWS, COLUMNS),
    "constant rows": draw(ROWS, 1).expand(ROWS, COLUMNS).contiguous(),
    "constant columns": draw(1, COLUMNS).expand(ROWS, COLUMNS).contiguous(),
    "one row": only(rows=17),
    "nine equal rows": only(rows=slice(7, 16)).sign(),
    "one column": only(columns=33),
    "eight columns": only(columns=slice(8, 16)),
    "stripes": torch.ones(ROWS, COLUMNS) - 2 * (torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS) % 2),
    "rising": torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS).float(),
    "heavy columns": draw(ROWS, COLUMNS) * draw(1, COLUMNS, seed=1) / draw(1, COLUMNS, seed=2),
    "heavy rows": draw(ROWS, COLUMNS) * draw(ROWS, 1, seed=1) / draw(ROWS, 1, seed=2),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_error_is_that_of_random_signs_whatever_the_gradient_looks_like(name):
    """Relative error of the norm at most 1 / sqrt(2 size), its square without bias: over 100 seeds."""
    gradient, seeds = STRUCTURES[name], 100
    squares = torch.stack([sketched(gradient, SIZE, seed).norm_squared() for seed in range(seeds)])
    ratios = squares / gradient.double().square().sum()
    errors = ratios.sqrt() - 1
    assert errors.square().mean().sqrt() < 1.25 / math.sqrt(2 * SIZE)
    assert abs(ratios.mean() - 1) < 4 * math.sqrt(2 / SIZE / seeds)


def test_the_error_is_not_smaller_than_it_should_be_either():
    """The test above would pass for a sketch that knew the norm; this one is random."""
    squares = torch.stack([sketched(STRUCTURES["random"], SIZE, seed).norm_squared() for seed in range(100)])
    assert squares.sqrt().std() / squares.sqrt().mean() > 0.75 / math.sqrt(2 * SIZE)


def test_signs_depend_on_seed_and_key_and_are_balanced():
    numel = 200_000
    kinds = [signs(seed, key, numel, SIZE).double() for seed, key in [(0, "a"), (1, "a"), (0, "b"), (0, "a@0:3")]]
    for index, one in enumerate(kinds):
        assert set(one.unique().tolist()) == {-1.0, 1.0}
        assert abs(one.mean()) < 5 / math.sqrt(numel)
        for other in kinds[:index]:
            assert abs((one * other).mean()) < 5 / math.sqrt(numel)
    assert torch.equal(kinds[0], signs(0, "a", numel, SIZE).double())


def test_signs_are_those_of_earlier_versions():
    """Scores of a resumed run are compared with estimates made before: the stream must not change with a library."""
    assert signs(7, "model.layers.0.mlp.up_proj.weight", 12, 5).tolist() == [-1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1]


def test_signs_of_a_matrix_have_no_pattern_of_rows_and_columns():
    """Products around the corners of rectangles, which are 1 for signs that are made of a row's and a column's."""
    table = signs(3, "w", 300 * SIZE, SIZE).view(300, SIZE).double()
    corners = table[::2, ::2][:150, :500] * table[1::2, ::2][:150, :500]
    corners = corners * table[::2, 1::2][:150, :500] * table[1::2, 1::2][:150, :500]
    assert abs(corners.mean()) < 5 / math.sqrt(corners.numel())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_entry_is_seen(value):
    gradient = draw(ROWS, COLUMNS)
    gradient[200, 5] = value
    assert not math.isfinite(sketched(gradient, SIZE).norm_squared())


def test_the_gradient_is_neither_changed_nor_kept():
    gradient = draw(ROWS, COLUMNS)
    before = gradient.clone()
    route = sketched(gradient.t(), SIZE)
    assert torch.equal(gradient, before)
    assert route.held_bytes() <= 4 * (2 * SIZE + 1 + ROWS * COLUMNS // SIZE)
    torch.testing.assert_close(route.result().double(), plain(before.t(), SIZE, 0, "w"), rtol=1e-5, atol=1e-4)


def test_without_a_gradient_there_is_nothing():
    route = Sketch(SIZE, 0, "w")
    assert route.result() is None
    assert route.held_bytes() == 0
    assert float(route.norm_squared()) == 0
    assert sketched_norm_squared(torch.tensor([3.0, 4.0])) == 25


def test_no_bucket_is_refused():
    with pytest.raises(ValueError, match="at least one bucket"):
        Sketch(0, 0, "w")
