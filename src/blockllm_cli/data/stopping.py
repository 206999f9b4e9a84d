"""How long work on data learns that the run is asked to stop; it then raises `errors.StopRequested`."""

from __future__ import annotations

from collections.abc import Callable

StopCheck = Callable[[], bool]
"""Asked often while data are read or built; true means: give up what is being prepared and return control."""


def never() -> bool:
    """The check of callers that cannot be stopped."""
    return False
