"""How long work learns that it is asked to stop, and tells how far it is; it knows nobody who listens."""

from __future__ import annotations

from collections.abc import Callable

StopCheck = Callable[[], bool]
"""Asked often while data are read or built; true means: give up what is in hand, raise `errors.StopRequested`."""

Progress = Callable[[float, float | None], None]
"""Told often how much is done, and of how much if that is known; whatever it does must be cheap."""


def never() -> bool:
    """The check of callers that cannot be stopped."""
    return False


def unheard(done: float, total: float | None = None) -> None:
    """The progress of callers that do not ask for it."""
