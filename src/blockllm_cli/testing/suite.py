"""All checks of the contract, for one method: as cases for pytest, or run one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from traceback import extract_tb
from typing import Any, Literal

from blockllm_cli.errors import RecipeError
from blockllm_cli.methods.base import Method
from blockllm_cli.methods.registry import method_class
from blockllm_cli.testing import claims, independence, learning, memory, state
from blockllm_cli.testing.subject import Check, ContractError, NotApplicableError, Subject, checked

CYCLE = "cycle"

CLAIMS: tuple[Check, ...] = (claims.states_its_facts,)
"""Hold of the class, whatever its options."""

GIVEN: tuple[Check, ...] = (learning.descends,)
"""Hold with the options of a run; those of a short cycle change what is trained too often to learn much."""

CYCLED: tuple[Check, ...] = (learning.moves_what_it_trains,)
"""Hold with the options of a short cycle, where there are some."""

BOTH: tuple[Check, ...] = (
    claims.trains_something,
    claims.has_a_pure_rate_factor,
    learning.uses_both_rates,
    learning.moves_in_proportion_to_the_rate,
    learning.writes_from_what_it_chose,
    learning.gives_plain_weights,
    memory.holds_what_it_planned,
    memory.holds_nothing_else,
    memory.keeps_state_in_the_dtype_asked_for,
    memory.counts_what_it_trains,
    state.resumes_to_the_bit,
    state.says_plain_things,
    state.loads_strictly,
    independence.accumulates_like_one_batch,
    independence.gives_up_an_update_without_trace,
    independence.repeats_itself,
    independence.is_the_same_layer_by_layer,
    independence.counts_lost_updates,
)
"""Hold with either."""


@dataclass(frozen=True)
class Case:
    """One check of one method with its options; its text is an id for pytest.

    Attributes:
        check: the function.
        subject: what it is given.
    """

    check: Check
    subject: Subject

    def __str__(self) -> str:
        return f"{self.check.__name__}{f'-{self.subject.label}' if self.subject.label else ''}"

    @property
    def title(self) -> str:
        """The promise in one line."""
        first = (self.check.__doc__ or self.check.__name__).splitlines()[0].rstrip(".")
        return f"{first} ({self.subject.label} options)" if self.subject.label else first

    def __call__(self) -> str | None:
        """Run the check; returns why it does not apply, or None.

        Raises:
            ContractError: the method breaks the promise.
        """
        try:
            self.check(self.subject)
        except NotApplicableError as reason:
            return str(reason)
        return None


@dataclass(frozen=True)
class Result:
    """What came of one case.

    Attributes:
        check: id of the case.
        title: the promise in one line.
        status: how it ended.
        message: why it failed or does not apply, else empty.
        seconds: how long it took.
    """

    check: str
    title: str
    status: Literal["passed", "failed", "not applicable"]
    message: str
    seconds: float


def cases(method: str | type[Method], options: Mapping[str, Any] | None = None) -> list[Case]:
    """What to hold a method to, one by one.

    In pytest: `@pytest.mark.parametrize("case", cases("adamw"), ids=str)` over a test that calls `case()`.
    Most checks come twice where the method has options for a short cycle (`facts.cycle`): with the options as they are,
    and with those of the cycle beside them, so that a few updates see several choices of what is trained.

    Args:
        method: name of a method, or a class that no name stands for yet.
        options: values of the `[method]` table; they go before those of the cycle.

    Raises:
        RecipeError: there is no such method or option, or a value is none that it may have.
    """
    kind = method_class(method) if isinstance(method, str) else method
    given = checked(kind, options or {})
    cycled = _cycled(given)
    subjects = [given] if cycled is None else [given, cycled]
    found = [Case(check, given) for check in (*CLAIMS, *GIVEN)]
    found += [Case(check, cycled or given) for check in CYCLED]
    return found + [Case(check, subject) for check in BOTH for subject in subjects]


def _cycled(given: Subject) -> Subject | None:
    """The same with the options of a short cycle; None if there are none, or if they do not go with those given."""
    cycle = given.kind.facts.cycle.options
    options = {**{key: value for key, value in cycle.items() if key not in given.options}, **given.options}
    if options.keys() == given.options.keys():
        return None
    try:
        return checked(given.kind, options, CYCLE)
    except RecipeError:
        if not given.options:
            raise
        return None


def run_suite(
    method: str | type[Method],
    options: Mapping[str, Any] | None = None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run every case of `cases(method, options)`, whatever the others came to.

    Args:
        method: as in `cases`.
        options: as in `cases`.
        on_result: called with each result as it is known.

    Raises:
        RecipeError: as `cases`.
    """
    results = []
    for case in cases(method, options):
        results.append(_result(case))
        on_result(results[-1])
    return results


def _result(case: Case) -> Result:
    started = time.perf_counter()
    status: Literal["passed", "failed", "not applicable"] = "passed"
    message = ""
    try:
        reason = case()
        if reason is not None:
            status, message = "not applicable", reason
    except ContractError as error:
        status, message = "failed", str(error)
    except (
        Exception
    ) as error:  # a method that raises breaks the promise, and the other checks still have something to say
        place = extract_tb(error.__traceback__)[-1]
        status = "failed"
        message = f"{case.subject}: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
    return Result(str(case), case.title, status, message, time.perf_counter() - started)
