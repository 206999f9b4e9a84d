"""A sketch of a gradient, from which its norm can be estimated: bucketed sums with random signs.

Entry i of the flattened piece is added with sign h(seed, key, i) to bucket i mod size. The map is linear, so sketches
of micro-batches add up to that of the batch; the expected square of its norm is that of the gradient's, and the
relative error of the norm is 1 / sqrt(2 size) (Charikar, Chen and Farach-Colton 2002; Alon, Matias and Szegedy 1996).

The hash: each bucket and each row of `size` entries has a random odd 32-bit number, and the sign of an entry is the top
bit of the product of its two. So the signs are made by one multiplication an entry, alike on every device and for any
part of the piece.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from blockllm_cli.gradients.routes import Route

SIZE = 1021
"""Buckets by default: relative error 2.2 %. A prime, so that no column of a matrix falls into few buckets: with 1024,
a gradient that lives in one column of a 1024-wide matrix is off by 59 %, with 1021 by 2 % (measured)."""

SIGN_BIT = -(2**31)
_ROWS_BYTES = 2**19
"""Signs are made and used for parts of this many bytes, which stay in the cache."""


def odd_numbers(seed: int, key: str, what: str, count: int) -> Tensor:
    """`count` odd numbers of 32 bits that depend on the arguments alone; the first ones do not depend on `count`."""
    digest = hashlib.blake2b(f"{seed}/{key}/{what}".encode(), digest_size=16).digest()
    draws = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    numbers = draws.integers(0, 2**32, size=count, dtype=np.uint32) | np.uint32(1)
    return torch.from_numpy(numbers.view(np.int32))


def signs(seed: int, key: str, numel: int, size: int) -> Tensor:
    """The signs of all entries of a piece, int8 (numel,) of +1 and -1: what the sketch uses, written plainly."""
    rows = -(-numel // size)
    product = odd_numbers(seed, key, "row", rows).unsqueeze(1) * odd_numbers(seed, key, "bucket", size)
    return torch.where(product < 0, -1, 1).to(torch.int8).view(-1)[:numel]


class Sketch(Route):
    """Keeps `size` bucketed sums of one piece's gradient, fp32.

    Args:
        size: buckets.
        seed: of the signs.
        key: names the piece, for the signs.
    """

    def __init__(self, size: int, seed: int, key: str) -> None:
        self._size = size
        self._seed = seed
        self._key = key
        self._buckets: Tensor | None = None

    @torch.no_grad()
    def accept(self, gradient: Tensor) -> None:
        """Add the buckets of `gradient` (any shape, fp32 or bf16), which is read only."""
        flat = gradient.reshape(-1)
        if self._buckets is None:
            self._buckets = torch.zeros(self._size, dtype=torch.float32, device=flat.device)
        rows = -(-flat.numel() // self._size)
        of_rows = odd_numbers(self._seed, self._key, "row", rows).to(flat.device)
        of_buckets = odd_numbers(self._seed, self._key, "bucket", self._size).to(flat.device)
        at_once = max(1, _ROWS_BYTES // (4 * self._size)) if flat.device.type == "cpu" else rows
        for start in range(0, rows, at_once):
            part = flat[start * self._size : (start + at_once) * self._size]
            self._add(part, of_rows[start : start + at_once], of_buckets)

    def _add(self, part: Tensor, of_rows: Tensor, of_buckets: Tensor) -> None:
        assert self._buckets is not None
        whole = part.numel() // self._size
        for values, numbers in (
            (part[: whole * self._size].view(whole, self._size), of_rows[:whole]),
            (part[whole * self._size :].view(1, -1), of_rows[whole:]),
        ):
            if values.numel() == 0:
                continue
            flips = (numbers.unsqueeze(1) * of_buckets[: values.shape[1]]).bitwise_and_(SIGN_BIT)
            # The top bit of an fp32 number is its sign.
            flipped = flips.bitwise_xor_(values.float().view(torch.int32)).view(torch.float32)
            self._buckets[: values.shape[1]] += flipped.sum(0)

    def result(self) -> Tensor | None:
        """The buckets, fp32 (size,)."""
        return self._buckets

    def held_bytes(self) -> int:
        """Bytes of the buckets."""
        return 0 if self._buckets is None else self._buckets.untyped_storage().nbytes()


def sketched_norm_squared(buckets: Tensor) -> Tensor:
    """Estimate of the squared norm behind a sketch, float64 scalar on its device."""
    return buckets.double().square().sum()
