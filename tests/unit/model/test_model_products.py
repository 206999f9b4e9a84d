"""Products are the same to rounding by either library, whatever the layout of what is multiplied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blockllm_cli.model import products
from blockllm_cli.model.products import product, takes_out

M, K, N = 192, 160, 176  # more multiplications than the fewest that are worth a call of oneDNN


def layouts(rows: int, columns: int, seed: int) -> dict[str, Tensor]:
    """One matrix in every layout that the model multiplies."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    wide, tall = torch.zeros(rows, columns + 32), torch.zeros(columns, rows + 32)
    wide[:, 16:-16], tall[:, 16:-16] = values, values.t()
    return {
        "rows": values,
        "transposed": values.t().contiguous().t(),
        "columns of a wider one": wide[:, 16:-16],
        "columns of a wider one, transposed": tall[:, 16:-16].t(),
        "every other row": torch.stack((values, values), 1)[:, 0],
    }


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch"])
def by_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("left", layouts(1, 1, 0))
@pytest.mark.parametrize("right", layouts(1, 1, 0))
def test_the_layout_does_not_matter(by_onednn: bool, left: str, right: str) -> None:
    a, b = layouts(M, K, 1)[left], layouts(K, N, 2)[right]
    made = product(a, b)
    torch.testing.assert_close(made, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-4)
    assert made.is_contiguous()


def test_room_for_the_result_is_used_where_it_can_be(by_onednn: bool) -> None:
    a, b, room = torch.randn(M, K), torch.randn(K, N), torch.full((M, N), torch.nan)
    assert takes_out(a) is not by_onednn
    made = product(a, b, out=room)
    assert (made.data_ptr() == room.data_ptr()) is takes_out(a)
    torch.testing.assert_close(made, a @ b, rtol=1e-5, atol=1e-4)


def test_small_products_and_other_dtypes_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: True)
    for a, b in (
        (torch.randn(8, 16), torch.randn(16, 8)),
        (torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()),
        (torch.randn(M, K).double(), torch.randn(K, N).double()),
    ):
        assert torch.equal(product(a, b), a @ b)


@pytest.mark.parametrize(
    ("said", "slow"),
    [
        ("processor : 0\nvendor_id\t: AuthenticAMD\nflags : avx512f\n", True),
        ("processor : 0\nvendor_id\t: GenuineIntel\n", False),
        ("Processor : AArch64\n", False),
    ],
)
def test_who_made_the_processor_decides(said: str, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.Path, "read_text", lambda *_, **__: said)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products._mkl_is_slow.__wrapped__() is slow
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert products._mkl_is_slow.__wrapped__() is False


@pytest.mark.parametrize("layout", layouts(1, 1, 0))
def test_onednn_is_given_no_matrix_with_gaps_for_which_it_has_no_fast_kernel(layout: str) -> None:
    matrix = layouts(M, K, 3)[layout]
    dense = products._dense(matrix)
    assert dense.is_contiguous() or dense.t().is_contiguous()
    assert torch.equal(dense, matrix)
    assert (dense is matrix) is (matrix.is_contiguous() or matrix.t().is_contiguous())
