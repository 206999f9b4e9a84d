"""How one run talks to a hub: where it is, how long a fault is borne, and who is told what is waited for.

Every call of the client libraries goes through `Link.patiently`. It runs in a thread that is left behind when the run
is asked to stop, so that Ctrl-C never waits for a server; and it is tried again, after growing pauses, until
`retry_seconds` have passed without progress. `datasets` and `huggingface_hub` have retries of their own, which end
after a fixed number of tries whatever a run would rather do.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from blockllm_cli.errors import InputError, StopRequested

Result = TypeVar("Result")
Event = dict[str, Any]

PROBE_SECONDS = 5.0
"""Within this time a hub must give some answer, once a run."""

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Any of them set to a true word means that no hub may be asked; those of the client libraries."""

OFFLINE_WAYS = (
    "without a network: --set data.corpus=builtin, or your own files with --set data.corpus=files "
    "--set 'data.train=DIR/*.jsonl', with --set tokenizer.source=train --set tokenizer.vocab_size=32000; a corpus that "
    "`blockllm data prepare` fetched before needs no network either"
)

_TRUE_WORDS = ("1", "on", "yes", "true")
_POLL_SECONDS = 0.05
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0


class FaultError(Exception):
    """Something went wrong that may go right when it is tried again.

    Attributes:
        retry_after: seconds that the server asked to be left alone for; None: it said nothing.
    """

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(eq=False)
class Link:
    """One run's way to the hub. Threads may share it.

    Attributes:
        retry_seconds: how long a fault is borne without progress.
        report: told of every fault, a dict with `kind` "network", `what`, `reason`, `attempt` and `pause_seconds`;
            called from whichever thread met the fault.
        out_of_reach: why nothing is asked of the hub; None: it is asked. `probe` finds out.
        doing: what is waited for at the moment, in words; empty when nothing is.
    """

    retry_seconds: float
    report: Callable[[Event], None] = lambda _: None
    out_of_reach: str | None = None
    doing: str = ""
    _is_probed: bool = False

    def probe(self, should_stop: Callable[[], bool]) -> str | None:
        """`out_of_reach`, after one look at the hub at the first call.

        Raises:
            StopRequested: `should_stop` became true.
        """
        if not self._is_probed:
            self.out_of_reach = why_out_of_reach(should_stop)
            self._is_probed = True
        return self.out_of_reach

    def patiently(
        self,
        what: str,
        attempt: Callable[[], Result],
        should_stop: Callable[[], bool],
        *,
        limit: float | None = None,
    ) -> Result:
        """The result of `attempt`, which is tried again after a `FaultError` until the patience ends.

        Args:
            what: what is wanted, for messages.
            attempt: run in a thread of its own.
            should_stop: looked at while waiting.
            limit: seconds for one attempt; None: `retry_seconds`, but at least `PROBE_SECONDS`.

        Raises:
            InputError: it did not succeed in time, or `attempt` raised it.
            StopRequested: `should_stop` became true.
        """
        patience = Patience(self, what, should_stop)
        while True:
            try:
                return in_background(attempt, should_stop, limit=limit or max(self.retry_seconds, PROBE_SECONDS))
            except FaultError as fault:
                patience.wait(fault)


class Patience:
    """Pauses between attempts at one thing, and their end.

    Args:
        link: how long, and who is told.
        what: what is wanted.
        should_stop: looked at while pausing.
    """

    def __init__(self, link: Link, what: str, should_stop: Callable[[], bool]) -> None:
        self._link = link
        self._what = what
        self._should_stop = should_stop
        self.progress()

    def progress(self) -> None:
        """Something has come: the time of `retry_seconds` begins anew."""
        self._since = time.monotonic()
        self._attempts = 0

    def wait(self, fault: FaultError) -> None:
        """Pause before the next attempt.

        Raises:
            InputError: the time is over, or the server asks for more of it than is left.
            StopRequested: a stop was asked for.
        """
        self._attempts += 1
        left = self._link.retry_seconds - (time.monotonic() - self._since)
        pause = fault.retry_after
        if pause is None:
            pause = min(_FIRST_PAUSE * 2 ** (self._attempts - 1), _LONGEST_PAUSE, max(left, 0.0))
        if left <= 0 or pause > left:
            asked = f", which asks to be left alone for {pause:.0f} s" if fault.retry_after is not None else ""
            raise InputError(
                f"{self._what}: {fault}{asked} (attempts: {self._attempts}; data.retry_seconds = "
                f"{self._link.retry_seconds:g} allows no more). The hub may be down: try again later, raise "
                f"data.retry_seconds, or go on {OFFLINE_WAYS}"
            ) from fault
        self._link.report(
            {
                "kind": "network",
                "what": self._what,
                "reason": str(fault),
                "attempt": self._attempts,
                "pause_seconds": round(pause, 1),
            }
        )
        self._link.doing = f"{self._what}: {fault}; attempt {self._attempts + 1} follows within {pause:.0f} s"
        end = time.monotonic() + pause
        while (rest := end - time.monotonic()) > 0:
            if self._should_stop():
                raise StopRequested
            time.sleep(min(_POLL_SECONDS, rest))
        self._link.doing = self._what


def in_background(call: Callable[[], Result], should_stop: Callable[[], bool], *, limit: float) -> Result:
    """The result of `call`, run in a daemon thread that is abandoned at a stop or when the time is up.

    For calls that only read and return something: what an abandoned one still does must not matter.

    Raises:
        FaultError: no result within `limit` seconds.
        StopRequested: `should_stop` became true.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, name="blockllm-hub", daemon=True)
    end = time.monotonic() + limit
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        if should_stop():
            raise StopRequested
        if time.monotonic() > end and thread.is_alive():
            raise FaultError(f"no answer within {limit:.0f} s")
    if errors:
        raise errors[0]
    return results[0]


def offline_variable() -> str | None:
    """Name of the variable by which the user forbids to ask any hub, or None."""
    return next((name for name in OFFLINE_VARIABLES if os.environ.get(name, "").lower() in _TRUE_WORDS), None)


def why_out_of_reach(should_stop: Callable[[], bool]) -> str | None:
    """Why no hub can be asked, or None if it gave any answer within `PROBE_SECONDS`, a refusal too.

    Raises:
        StopRequested: a stop was asked for.
    """
    from blockllm_cli.hub.http import endpoint, probe, shown

    variable = offline_variable()
    if variable is not None:
        return f"{variable} is set"
    try:
        in_background(probe, should_stop, limit=PROBE_SECONDS)
    except FaultError as fault:
        return f"{shown(endpoint())} cannot be reached ({fault})"
    return None
