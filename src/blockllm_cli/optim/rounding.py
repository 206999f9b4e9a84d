"""How fp32 results become bf16: to the nearest value, or stochastically, so that small updates survive on average.

Nearest rounding loses every update below half the distance of neighbouring values (2**-9 of the weight); stochastic
rounding goes to either neighbour with the probability that makes the expected value exact.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from blockllm_cli.optim.scratch import Scratch

DRAW_ENTRIES = 2**21
"""Entries of a tensor whose draws are one sequence, of which every four take one number of 64 bits."""


class StochasticRounder:
    """Rounds fp32 to bf16 at random, without bias.

    Draws depend on (seed, key, number of the entry) alone, through a generator of its own on the tensor's device: not
    on the global generators, the order of calls or how a batch was cut, and a resumed run draws the same again. Devices
    of another type draw other numbers; on these, how a tensor is cut shows.

    Args:
        seed: of all draws.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._place: tuple[torch.device, str, int] | None = None

    def write(self, target: Tensor, source: Tensor, key: str, start: int = 0, scratch: Scratch | None = None) -> None:
        """Round `source` into `target`.

        Args:
            target: bf16, overwritten; any shape.
            source: fp32, contiguous, in the shape of `target`; its memory is used and holds garbage afterwards.
            key: names the draws, such as "<parameter>/<step>".
            start: number of the first entry in the tensor that `key` names, where that is written in parts, in their
                order; a multiple of 4.
            scratch: workspace; None makes its own.

        Infinities and NaN are kept; a finite value beyond the largest bf16 becomes infinite, as in nearest rounding.
        """
        scratch = scratch or Scratch(source.numel(), source.device)
        target, source = target.view(-1), source.view(-1)
        done = 0
        while done < source.numel():
            size = min(source.numel() - done, DRAW_ENTRIES - (start + done) % DRAW_ENTRIES)
            part = slice(done, done + size)
            self._write(target[part], source[part], self._generator(source.device, key, start + done), scratch)
            done += size
            self._place = (source.device, key, start + done)

    @staticmethod
    def _write(target: Tensor, source: Tensor, generator: torch.Generator, scratch: Scratch) -> None:
        # bf16 is the upper half of fp32: a random lower half is added and the lower half cut off, which carries into
        # the upper half with probability (lower half) / 2**16. The sign bit takes no part, so negative values behave
        # alike. A draw of 64 bits serves four entries; 2**15 makes its signed quarters 0 to 2**16 - 1.
        bits = source.view(torch.int32)
        quads = scratch.take("draws", (bits.numel() + 3) // 4, torch.int64)
        draws = quads.random_(-(2**63), None, generator=generator).view(torch.int16)[: bits.numel()]
        # NaN alone would not survive that (infinity does: its lower half is zero). On the host one sum tells that there
        # is none; it may cry wolf, over infinities of both signs.
        is_plain = source.device.type == "cpu" and not math.isnan(source.sum())
        if not is_plain:
            is_number = source == source
            target.copy_(source)
        bits.add_(scratch.take("wide draws", bits.numel(), torch.int32).copy_(draws)).add_(2**15).bitwise_and_(-(2**16))
        if is_plain:
            target.copy_(source)
        else:
            torch.where(is_number, source.bfloat16(), target, out=target)

    def _generator(self, device: torch.device, key: str, start: int) -> torch.Generator:
        """One that gives the draws of `key` from the entry `start` on."""
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
        skipped = start % DRAW_ENTRIES
        if skipped and self._place == (device, key, start):
            return generator
        digest = hashlib.blake2b(f"{self._seed}/{key}/{start - skipped}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little", signed=True))
        if skipped:
            torch.empty(skipped // 4, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
        return generator
