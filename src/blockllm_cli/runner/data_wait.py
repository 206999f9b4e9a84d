"""Whether a run waits for its data, and what to do about it."""

from __future__ import annotations

WARNED_SHARE = 0.05
"""A run that spends more of its time than this on waiting for data is told so, once."""

MIN_WAITED_SECONDS = 2.0
"""Below this a share says little."""


class DataWait:
    """Judges the time spent on waiting for data; what passes before the first look, when all begins, does not count.

    Args:
        workers: `data.workers` of the run.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._first: tuple[float, float] | None = None
        self._has_warned = False

    def look(self, waited: float, trained: float) -> str | None:
        """A warning, the first time that one is due.

        Args:
            waited: seconds spent waiting for data since the process began.
            trained: seconds spent in updates since then.
        """
        if self._first is None:
            self._first = waited, trained
        waited, trained = waited - self._first[0], trained - self._first[1]
        if self._has_warned or waited < MIN_WAITED_SECONDS or waited <= WARNED_SHARE * (waited + trained):
            return None
        self._has_warned = True
        share = f"{waited / (waited + trained):.0%}".replace("%", " %")
        return (
            f"{share} of the training time so far went into waiting for data; tokenise them once with "
            f"`blockllm data prepare RECIPE`, or raise data.workers (now {self._workers})"
        )
