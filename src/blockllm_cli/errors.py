"""Every failure a user can meet, each with the exit code the process ends with.

An instance's text is what the user reads: what is wrong, where (file, line, key, value), and the way out. Anything
that is not a `BlockLLMError` is our own bug and ends with code 1 and a traceback.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit codes of the command; a stop by a signal ends with 128 + its number."""

    OK = 0
    BUG = 1
    USAGE = 2
    INPUT = 3
    DIVERGED = 5
    STORAGE = 6
    GUARD = 7


class BlockLLMError(Exception):
    """An expected failure: printed as one message on stderr, without a traceback."""

    exit_code: ClassVar[int] = ExitCode.BUG


class RecipeError(BlockLLMError):
    """The recipe, a flag or their combination is refused (code 2)."""

    exit_code = ExitCode.USAGE


class InputError(BlockLLMError):
    """Data, tokenizer or checkpoint cannot be used as they are (code 3)."""

    exit_code = ExitCode.INPUT


class DivergedError(BlockLLMError):
    """The loss or the gradient stopped being finite (code 5)."""

    exit_code = ExitCode.DIVERGED


class StorageError(BlockLLMError):
    """The disk is full, read-only or locked by another process (code 6)."""

    exit_code = ExitCode.STORAGE


class GuardError(BlockLLMError):
    """A method broke a promise of its own, such as a budget or the memory plan (code 7)."""

    exit_code = ExitCode.GUARD


class StopRequested(Exception):  # noqa: N818  a request, as StopIteration is, and not an error
    """`should_stop` became true; whoever took the signal makes an `InterruptedRunError` of it."""


class InterruptedRunError(BlockLLMError):
    """SIGINT or SIGTERM asked the run to stop; what could be saved has been (code 128 + signal)."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    @property
    def status(self) -> int:
        """Exit status of the process."""
        return 128 + self.signal_number
