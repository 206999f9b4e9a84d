"""The largest entries or rows of a gradient, exactly, with ties to the lower position."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blockllm_cli.optim.bitmap import is_on_host, set_positions

_SLICE = 2**18
"""Entries that are looked at at a time."""

_SAMPLES = 2**14
_SPARE = 8
"""The guess at the threshold is low enough if it lets an eighth more of all entries pass than are wanted, or less."""


def largest_entries(gradient: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest magnitudes, int64, ascending; ties go to the lower position.

    Args:
        gradient: any shape and float dtype of 16 bits or more; not modified. NaN counts as larger than infinity, so
            that what is kept of a gradient that is not finite is not finite either, which the kept norm shows.
        count: 0 to the number of entries.
    """
    return _largest(gradient.reshape(-1), count)


def largest_rows(gradient: Tensor, count: int) -> Tensor:
    """Indices of the `count` rows with the largest Euclidean norm (fp32), int64, ascending; ties as above."""
    rows = gradient.reshape(gradient.shape[0], -1)
    return _largest(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32), count)


def _largest(values: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest magnitudes of a 1-D tensor; memory is bounded by a slice and the result."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    if is_on_host(values) and (found := _guessed(values, count)) is not None:
        return found
    threshold, ties = _threshold(values, count)
    chosen = []
    for start, keys in _keys(values):
        taken = keys > threshold
        equal = (keys == threshold).nonzero().view(-1)[:ties]
        taken[equal] = True
        ties -= equal.numel()
        chosen.append(taken.nonzero().view(-1) + start)
    return torch.cat(chosen)


def _guessed(values: Tensor, count: int) -> Tensor | None:
    """`_largest` on the host in one reading; None if the sample misled, so that another way has to be taken.

    A sample gives a threshold that is almost surely a little too low; the entries above it are noted in one reading of
    `values`, and the exact threshold is found among these few. So chance decides about the time, never the result.
    """
    passed = _above(values, _low_threshold(values, count), count + values.numel() // _SPARE)
    if passed is None:
        return None
    keys = np.concatenate([keys for _, keys in passed])
    if keys.size < count:
        return None
    keys.partition(keys.size - count)
    threshold = keys[keys.size - count]
    ties = count - int(np.count_nonzero(keys[keys.size - count :] > threshold))
    del keys
    found = torch.empty(count, dtype=torch.int64)
    done = 0
    for number, (positions, slice_keys) in enumerate(passed):
        taken = slice_keys > threshold
        equal = np.flatnonzero(slice_keys == threshold)[:ties]
        taken[equal] = True
        ties -= equal.size
        chosen = torch.from_numpy(positions[set_positions(taken)])
        torch.add(chosen, number * _SLICE, out=found[done : done + chosen.numel()])
        done += chosen.numel()
    return found


def _low_threshold(values: Tensor, count: int) -> int:
    """A key that is exceeded by more than `count` entries, four standard deviations of the sample to be safe."""
    # An odd distance meets all columns of a matrix in turn.
    sample = _key_bits(values[:: values.numel() // _SAMPLES | 1])
    share = count / values.numel()
    wanted = share + 4 * math.sqrt(share * (1 - share) / sample.numel()) + 4 / sample.numel()
    rank = max(0, sample.numel() - 1 - math.ceil(wanted * sample.numel()))
    return 0 if wanted >= 1 else int(np.partition(sample.numpy(), rank)[rank])


def _above(values: Tensor, least: int, most: int) -> list[tuple[NDArray[np.int32], NDArray[np.signedinteger]]] | None:
    """For each slice, where keys are `least` or more, and these keys; None if they are more than `most` in all."""
    found = []
    count = 0
    for _, keys in _keys(values):
        positions = set_positions(keys.numpy() >= least)
        count += positions.size
        if count > most:
            return None
        found.append((positions.astype(np.int32), keys.numpy()[positions]))
    return found


def _threshold(values: Tensor, count: int) -> tuple[int, int]:
    """The `count`-th largest key, and how many of the keys equal to it are among the `count` largest.

    A radix selection: the key is found 16 bits at a time by counting how often each value of these bits occurs among
    the keys that agree with what was found before. Counts are exact, so the result is the same on every device.
    """
    highest = 8 * values.element_size() - 16
    found = 0
    for shift in range(highest, -1, -16):
        times = torch.zeros(2**16, dtype=torch.int64, device=values.device)
        for _, keys in _keys(values):
            digits = keys >> shift
            if shift != highest:
                digits = digits[keys >> (shift + 16) == found].bitwise_and_(2**16 - 1)
            times += torch.bincount(digits, minlength=2**16)
        at_least = times.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= count).count_nonzero()) - 1
        count -= int(at_least[digit] - times[digit])
        found = found << 16 | digit
    return found, count


def _keys(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first position, whole numbers in the order of the magnitudes) of consecutive slices."""
    for start in range(0, values.numel(), _SLICE):
        yield start, _key_bits(values[start : start + _SLICE])


def _key_bits(values: Tensor) -> Tensor:
    """The bits without sign."""
    return values.abs().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
