"""Runs a case: starts its workers, lets them repeat in turn, and notes what each came to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from speed.cases import Case, Contestant
from speed.client import PeerAbsentError, Worker, WorkerFailedError, python_of
from speed.results import CaseResult, Outcome

Start = Callable[[Contestant], Worker]


def starter(environments: Path, threads: int) -> Start:
    """What starts the worker of a contestant in its environment."""

    def start(contestant: Contestant) -> Worker:
        python = python_of(contestant.peer, environments)
        return Worker([str(python), "-m", f"speed.workers.{contestant.worker}"], contestant.spec, threads)

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
        for _ in range(case.warm_up):
            _each(workers, outcomes, lambda worker, _: worker.repeat())
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
    workers: dict[str, Worker], outcomes: Mapping[str, Outcome], act: Callable[[Worker, Outcome], object]
) -> None:
    """Let every worker act once; one that fails is closed and has no further turns."""
    for label, worker in list(workers.items()):
        outcome = outcomes[label]
        try:
            act(worker, outcome)
        except WorkerFailedError as error:
            outcome.state, outcome.reason = "failed", str(error)
            workers.pop(label).close()


def _await_ready(worker: Worker, outcome: Outcome) -> None:
    facts = worker.ready()
    outcome.versions = facts.pop("versions")
    outcome.facts = facts


def _rounded(repeat: dict[str, object]) -> dict[str, object]:
    """Seconds to the microsecond, which is more than they are worth."""
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in repeat.items()}
