"""Runs a case: starts its workers, lets them repeat in turn, and notes what each came to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from speed.cases import Case, Contestant
from speed.client import PeerAbsentError, Worker, WorkerFailedError, python_of
from speed.results import CaseResult, Outcome

CORES = os.cpu_count() or 1
Start = Callable[[Contestant], Worker]


def starter(environments: Path, threads: int) -> Start:
    """What starts the worker of a contestant in its environment."""

    def start(contestant: Contestant) -> Worker:
        python = python_of(contestant.peer, environments)
        return Worker(
            [str(python), "-m", f"speed.workers.{contestant.worker}"],
            contestant.spec,
            threads,
            environments / "compiled",
        )

    return start


def run_case(case: Case, seconds: float, start: Start) -> CaseResult:
    """Measure a case within `seconds`, the start of its workers included; its fewest rounds are made in any case."""
    end = time.monotonic() + seconds
    outcomes = {each.label: Outcome(peer=each.peer, kind=each.kind) for each in case.contestants}
    workers: dict[str, Worker] = {}
    try:
        for contestant in case.contestants:
            outcome = outcomes[contestant.label]
            try:
                workers[contestant.label] = start(contestant)
            except PeerAbsentError as error:
                outcome.state, outcome.reason = "absent", str(error)
            except WorkerFailedError as error:
                outcome.state, outcome.reason = "failed", str(error)
        _each(workers, outcomes, _await_ready)
        for number in range(case.warm_up):
            # The first is where things are compiled: as many at a time as there are cores, since nothing is timed.
            _each(workers, outcomes, lambda worker, _: worker.repeat(), at_a_time=CORES if number == 0 else 1)
        fewest, most = case.rounds
        for made in range(most):
            if made >= fewest and time.monotonic() > end:
                break
            _each(workers, outcomes, lambda worker, outcome: outcome.repeats.append(_rounded(worker.repeat())))
    finally:
        for worker in workers.values():
            worker.close()
    return CaseResult(work=case.work, unit=case.unit, outcomes=outcomes)


def _each(
    workers: dict[str, Worker],
    outcomes: Mapping[str, Outcome],
    act: Callable[[Worker, Outcome], object],
    at_a_time: int = 1,
) -> None:
    """Let every worker act once; one that fails is closed and has no further turns."""

    def turn(label: str) -> None:
        try:
            act(workers[label], outcomes[label])
        except WorkerFailedError as error:
            outcomes[label].state, outcomes[label].reason = "failed", str(error)
            workers[label].close()

    with ThreadPoolExecutor(at_a_time) as pool:
        try:
            list(pool.map(turn, list(workers)))
        except BaseException:  # an interrupt, say: nobody waits for what is under way
            for worker in workers.values():
                worker.kill()
            raise
    for label in [label for label in workers if outcomes[label].state == "failed"]:
        del workers[label]


def _await_ready(worker: Worker, outcome: Outcome) -> None:
    facts = worker.ready()
    outcome.versions = facts.pop("versions")
    outcome.facts = facts


def _rounded(repeat: dict[str, object]) -> dict[str, object]:
    """Seconds to the microsecond, which is more than they are worth."""
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in repeat.items()}
