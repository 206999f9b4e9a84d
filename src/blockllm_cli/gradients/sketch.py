"""An estimate of a gradient's norm from sums of its entries with random signs, a few kilobytes per parameter.

This is AMS's estimator in its bucketed form (Alon, Matias, Szegedy 1996; Charikar, Chen, Farach-Colton 2002): entry i
is added with a random sign to bucket i mod `size`. Products of different entries of a bucket cancel on average, so the
sum of the squared buckets has the squared norm as its mean, and the relative error of the norm is 1 / sqrt(2 size) for
a gradient whose weight is spread over the buckets. The sums are linear, so micro-batches add up.

The hash is a multiplication: write i = r * size + j; the sign of entry i is the top bit of a_r * b_j mod 2**32 with
random odd a_r and b_j. That costs one integer product per entry and no memory per entry, and unlike a product of two
signs it has no pattern that several rows and buckets share.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from blockllm_cli.gradients.routes import Route

SIZE = 1021
"""Buckets by default, for a relative error of 2.2 %. A prime, so that no column of a matrix falls into few buckets. If
all of a gradient is in one column of a 1024-wide matrix, 1024 buckets are off by 65 %, 1021 by 0.1 %
(`bench/sketch.py`)."""

_CPU_SLICE = 2**17
"""Entries that are worked on together on the CPU: 512 KiB of signs, as much of widened values, in the cache."""

_DEVICE_SLICE = 2**24
"""The same elsewhere, where only the 64 MiB of workspace are a concern."""

_TOP_BIT = -(2**31)


class Sketch(Route):
    """Keeps `size` sums of entries with random signs, in fp32; see the module.

    A gradient of at most `size` entries is alone in its buckets, and its norm exact. Entries beyond fp32's range and
    precision (float64 gradients) are rounded to it.

    Args:
        size: number of buckets; it should have no factor in common with the length of the gradient's rows.
        seed: with `key` it says which signs; the same on every device.
        key: name of what is sketched.

    Raises:
        ValueError: `size` is not positive.
    """

    def __init__(self, size: int, seed: int, key: str) -> None:
        if size < 1:
            raise ValueError(f"a sketch needs at least one bucket, not {size}")
        self._size = size
        self._seed = seed
        self._key = key
        self._sums: Tensor | None = None
        self._row_factors: Tensor | None = None
        self._bucket_factors: Tensor | None = None

    @torch.no_grad()
    def accept(self, gradient: Tensor) -> None:
        """Add the entries of `gradient` (any shape, row-major) to their buckets; it is neither kept nor changed."""
        flat = gradient.reshape(-1)
        if self._sums is None:
            self._sums = torch.zeros(self._size, dtype=torch.float32, device=flat.device)
            rows, buckets = _factors(self._seed, self._key, flat.numel(), self._size)
            self._row_factors, self._bucket_factors = rows.to(flat.device), buckets.to(flat.device)
        assert self._row_factors is not None
        whole = flat.numel() // self._size
        entries = _CPU_SLICE if flat.device.type == "cpu" else _DEVICE_SLICE
        body = flat[: whole * self._size].view(whole, self._size)
        step = max(1, entries // self._size)
        for start in range(0, whole, step):
            part = slice(start, min(start + step, whole))
            self._add(body[part], self._row_factors[part])
        if whole * self._size < flat.numel():
            self._add(flat[whole * self._size :].unsqueeze(0), self._row_factors[whole:])

    def _add(self, values: Tensor, row_factors: Tensor) -> None:
        """Add up `values` (rows, columns) along rows, with signs; columns are the first buckets."""
        assert self._sums is not None
        assert self._bucket_factors is not None
        columns = values.shape[1]
        signed = row_factors.unsqueeze(1) * self._bucket_factors[:columns]
        # The top bit of the product goes onto the sign bit of the fp32 value: exact, and no branch.
        signed.bitwise_and_(_TOP_BIT).bitwise_xor_(values.float().view(torch.int32))
        self._sums[:columns].add_(signed.view(torch.float32).sum(0))

    def result(self) -> Tensor | None:
        """The sums, fp32 (size,)."""
        return self._sums

    def held_bytes(self) -> int:
        """Bytes of the sums and of the hash's factors: 4 per bucket twice, and 4 per `size` entries."""
        tensors = (self._sums, self._row_factors, self._bucket_factors)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def norm_squared(self) -> Tensor:
        """As `sketched_norm_squared` of the result; 0, on the CPU, without a gradient."""
        return torch.zeros((), dtype=torch.float64) if self._sums is None else sketched_norm_squared(self._sums)


def sketched_norm_squared(sums: Tensor) -> Tensor:
    """Estimate of the squared Euclidean norm behind the result of a `Sketch`, a float64 scalar on its device.

    A non-finite entry of the gradient makes it non-finite.
    """
    return sums.double().square().sum()


def sketch_bytes(numel: int, size: int = SIZE) -> int:
    """What a `Sketch` of a gradient of `numel` entries holds: its sums, and the factors of rows and of buckets."""
    return 4 * (2 * size + -(-numel // size))


def signs(seed: int, key: str, numel: int, size: int) -> Tensor:
    """The sign of each entry, 1 or -1, int8 (numel,): what `Sketch` multiplies by, made for all entries at once."""
    rows, buckets = _factors(seed, key, numel, size)
    products = (rows.unsqueeze(1) * buckets).view(-1)[:numel]
    return torch.where(products < 0, -1, 1).to(torch.int8)


def _factors(seed: int, key: str, numel: int, size: int) -> tuple[Tensor, Tensor]:
    """Random odd int32 per row of `size` entries, (ceil(numel / size),), and per bucket, (size,), on the CPU.

    The raw stream of Philox (Salmon et al. 2011) is the same with every version of NumPy.
    """
    rows = -(-numel // size)
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()
    source = np.random.Philox(key=int.from_bytes(digest, "little"))
    words = source.random_raw((rows + size + 1) // 2).astype("<u8").view("<u4") | 1
    factors = torch.from_numpy(words.view(np.int32).copy())
    return factors[size : size + rows], factors[:size]
