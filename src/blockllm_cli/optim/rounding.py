"""How fp32 results become bf16: to the nearest value, or stochastically, so that small updates survive on average.

Nearest rounding loses every update below half the distance of neighbouring values (2**-9 of the weight); stochastic
rounding goes to either neighbour with the probability that makes the expected value exact.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class StochasticRounder:
    """Rounds fp32 to bf16 at random, without bias.

    Draws depend on (seed, key) alone, through a generator of its own on the tensor's device: not on the global
    generators, the order of calls or how a batch was cut, and a resumed run draws the same again. Devices of another
    type draw other numbers.

    Args:
        seed: of all draws.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def write(self, target: Tensor, source: Tensor, key: str) -> None:
        """Round `source` into `target`.

        Args:
            target: bf16, overwritten; any shape.
            source: fp32, contiguous, in the shape of `target`; its memory is used and holds garbage afterwards.
            key: names the draws, such as "<parameter>/<step>".

        Infinities and NaN are kept; a finite value beyond the largest bf16 becomes infinite, as in nearest rounding.
        """
        # bf16 is the upper half of fp32: a random lower half is added and the lower half cut off, which carries into
        # the upper half with probability (lower half) / 2**16. The sign bit takes no part, so negative values behave
        # alike. A draw of 64 bits serves four entries; 2**15 makes its signed quarters 0 to 2**16 - 1.
        bits = source.view(-1).view(torch.int32)
        quads = torch.empty((bits.numel() + 3) // 4, dtype=torch.int64, device=bits.device)
        draws = quads.random_(-(2**63), None, generator=self._generator(bits.device, key)).view(torch.int16)
        is_finite = source.abs() < float("inf")
        target.copy_(source)
        bits.add_(draws[: bits.numel()]).add_(2**15).bitwise_and_(-(2**16))
        torch.where(is_finite, source.bfloat16(), target, out=target)

    def _generator(self, device: torch.device, key: str) -> torch.Generator:
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
        digest = hashlib.blake2b(f"{self._seed}/{key}".encode(), digest_size=8).digest()
        return generator.manual_seed(int.from_bytes(digest, "little", signed=True))
