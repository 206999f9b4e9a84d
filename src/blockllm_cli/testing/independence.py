"""Checks of what must not matter: micro-batches, updates given up, layer-wise writes, generators of others."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from blockllm_cli.errors import RecipeError
from blockllm_cli.gradients.routes import Route
from blockllm_cli.methods.base import Rates
from blockllm_cli.methods.registry import method_class, method_names
from blockllm_cli.methods.resolve import resolve_recipe
from blockllm_cli.optim.precision import PrecisionName
from blockllm_cli.recipe.kinds import literal
from blockllm_cli.testing.comparing import first_difference, moved
from blockllm_cli.testing.subject import PRECISIONS, NotApplicableError, Subject, Trial, scaled

SHARE = 1e-3
"""Share of entries that may take another way: a sign, or a choice between two, can hang on the last bit of a sum."""


def accumulates_like_one_batch(subject: Subject) -> None:
    """One batch of R rows is m micro-batches of R / m rows, to rounding."""
    updates = range(1, 5)
    whole = subject.trial()
    big = whole.run(updates, subject.rates)
    for micro_batches in (2, 3, 6):
        cut = subject.trial(micro_batches=micro_batches)
        small = cut.run(updates, subject.rates)
        for step, one, other in zip(updates, big, small, strict=True):
            for what, left, right in (("loss", one.loss, other.loss), ("kept norm", one.norm, other.norm)):
                if not math.isclose(left, right, rel_tol=1e-5 if step == 1 else 1e-3):
                    raise subject.broken(
                        f"the {what} of update {step} is {left:.7g} with one batch, {right:.7g} with {micro_batches} "
                        "micro-batches",
                        "micro-batches are an implementation detail",
                    )
        _close(subject, whole, cut, len(updates), f"one batch and {micro_batches} micro-batches")


def _close(subject: Subject, one: Trial, other: Trial, updates: int, what: str) -> None:
    """Weights differ by less than a hundredth of what the rates can move them, but for a few entries."""
    others = other.weights()
    far, entries, worst = 0, 0, ("", 0.0)
    for name, value in one.weights().items():
        difference = (value - others[name]).abs()
        limit = 0.01 * updates * min(subject.rates.body, subject.rates.dense)
        far += int((difference > limit).sum())
        entries += value.numel()
        worst = max(worst, (name, float(difference.max())), key=lambda item: item[1])
    if far > SHARE * entries:
        raise subject.broken(
            f"after {updates} updates {far} of {entries} weights differ between {what}, by up to {worst[1]:.3g} in "
            f"{worst[0]} (rates {subject.rates.body:g}/{subject.rates.dense:g})",
            "both give the same update",
        )


def gives_up_an_update_without_trace(subject: Subject) -> None:
    """An update that ends before `update` is called leaves everything as it was, even a gradient of not-a-number."""
    for given_up in (1, 4):
        plain, disturbed = (subject.trial(layerwise_allowed=False) for _ in range(2))
        for trial in (plain, disturbed):
            trial.run(range(1, given_up), subject.rates)
        state, weights = _copied(disturbed.method.state_dict()), disturbed.weights()
        _stop_within(disturbed, given_up, subject.rates)
        norm = disturbed.ask(given_up, subject.rates, loss_factor=math.nan).norm
        if math.isfinite(norm):
            raise subject.broken(
                f"with gradients of not-a-number the kept norm of update {given_up} is {norm:g}",
                "what `choose` returns shows the trainer that a gradient is not finite",
            )
        difference = first_difference(state, disturbed.method.state_dict()) or first_difference(
            weights, disturbed.weights()
        )
        if not difference:
            for trial in (plain, disturbed):
                trial.run(range(given_up + 1, given_up + 5), subject.rates)
            difference = first_difference(plain.weights(), disturbed.weights()) or first_difference(
                plain.method.state_dict(), disturbed.method.state_dict()
            )
        if difference:
            raise subject.broken(
                f"an update {given_up} that was given up before anything was written left its trace: {difference}",
                "until `update` is called nothing that a later update depends on changes",
            )


def _stop_within(trial: Trial, step: int, rates: Rates) -> None:
    """Ask for the first pass of an update and for nothing more, as when a stop is asked for within it."""
    passes = trial.method.passes(step, scaled(rates, trial.method.rate_factor(step)))
    next(passes)
    passes.close()


def _copied(state: Mapping[str, object]) -> dict[str, object]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def repeats_itself(subject: Subject) -> None:
    """Equal seeds are equal runs to the bit, and generators of others are neither read nor moved."""
    for precision in PRECISIONS:
        ends: list[dict[str, Tensor]] = []
        for seed in (1, 2):
            with torch.random.fork_rng(devices=[]):
                python, numpy = random.getstate(), np.random.get_state()
                try:
                    ends.append(_run_seeded(subject, precision, seed))
                finally:
                    random.setstate(python)
                    np.random.set_state(numpy)
        if difference := first_difference(*ends):
            raise subject.broken(
                f"two runs in {precision} with other seeds of the global generators: {difference}",
                "a draw depends on (method seed, parameter, step) and on nothing else",
            )


def _run_seeded(subject: Subject, precision: PrecisionName, seed: int) -> dict[str, Tensor]:
    """Weights after some updates under global generators with `seed`, which must not move."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    before = {"torch": torch.get_rng_state(), "random": random.getstate(), "numpy": _numpy_state()}
    trial = subject.trial(precision, rounding="stochastic")
    trial.run(range(1, 5), subject.rates)
    after = {"torch": torch.get_rng_state(), "random": random.getstate(), "numpy": _numpy_state()}
    if difference := first_difference(before, after):
        raise subject.broken(f"the global generator of {difference.split()[0]} was drawn from", "none is")
    return trial.weights()


def _numpy_state() -> str:
    return str(np.random.get_state())


def is_the_same_layer_by_layer(subject: Subject) -> None:
    """Layer-wise writes change neither rates nor weights, and are refused where they cannot be exact."""
    facts, fields = subject.kind.facts, subject.kind.Options.model_fields
    if (facts.layerwise != "never") != ("layerwise" in fields):
        raise subject.broken(
            f'`facts.layerwise` is "{facts.layerwise}", and there is {"an" if "layerwise" in fields else "no"} option '
            "`layerwise`",
            "a method has the option exactly if it can",
        )
    if facts.layerwise == "never":
        raise NotApplicableError("it does not write inside the backward pass")
    if "layerwise" in subject.options:
        raise NotApplicableError("the option layerwise is given")
    try:
        on, off = subject.trial(layerwise=True), subject.trial(layerwise=False)
    except ValidationError as error:
        raise NotApplicableError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error
    _compare_layerwise(subject, on, off)
    _refuse_layerwise(subject)


def _compare_layerwise(subject: Subject, on: Trial, off: Trial) -> None:
    writes: list[bool] = []

    def note(routes: Mapping[str, Route]) -> None:
        writes.append(any(route.writes for route in routes.values()))

    updates = range(1, 13)
    on.run(updates, subject.rates, between=note)
    if not any(writes):
        raise subject.broken("with layerwise = true no route writes inside the backward pass", "the option has effect")
    writes.clear()
    off.run(updates, subject.rates, between=note)
    subject.trial(layerwise_allowed=False).run(range(1, 4), subject.rates, between=note)
    subject.trial(micro_batches=2).run(range(1, 4), subject.rates, between=note)
    if any(writes):
        raise subject.broken(
            "a route writes inside the backward pass with layerwise = false, with several micro-batches, or where the "
            "run does not allow it",
            "without being asked for, layer-wise writes happen only where they are exact",
        )
    _close(subject, on, off, len(updates), "layerwise = true and layerwise = false")


def _refuse_layerwise(subject: Subject) -> None:
    name = subject.kind.name
    if name not in method_names() or method_class(name) is not subject.kind:
        return
    options = {**subject.options, "layerwise": True}
    text = ",".join(f"{key}={literal(list(v) if isinstance(v, tuple) else v)}" for key, v in options.items())
    cases = {"batch.micro_rows=1": "several micro-batches", 'run.on_nonfinite="skip"': "updates that can be skipped"}
    if subject.kind.facts.layerwise == "any":
        cases["schedule.clip=1.0"] = "clipping"
    for setting, words in cases.items():
        try:
            resolve_recipe("quickstart", overrides=["schedule.clip=0.0", setting], method=f"{name}:{text}")
        except RecipeError as error:
            if "layerwise" in str(error):
                continue
            raise
        raise subject.broken(f"layerwise = true is accepted with {words} ({setting})", "it is refused")


def counts_lost_updates(subject: Subject) -> None:
    """`unchanged` is known for an update that counted and bf16 alone, and for no other."""
    trial = subject.trial("bf16")
    seen = [trial.method.unchanged]
    for step, rates, count in ((1, 1.0, False), (2, 1.0, True), (3, 1.0, False), (4, 0.0, True)):
        before = trial.weights()
        trial.update(step, scaled(subject.rates, rates), count_unchanged=count)
        seen.append(trial.method.unchanged)
        if step == 2 and moved(before, trial.weights()) and (seen[-1] is None or not 0.0 <= seen[-1] <= 1.0):
            raise subject.broken(f"after an update that counted, `unchanged` is {seen[-1]}", "it is a share")
    if seen[0] is not None or seen[1] is not None or seen[3] is not None:
        raise subject.broken(
            f"`unchanged` is {seen[:4]} after 0 to 3 updates, of which only the second counted",
            "it is None for what did not count, so that a resumed run says the same",
        )
    if seen[2] is not None and seen[4] != 1.0:
        raise subject.broken(f"`unchanged` is {seen[4]} after an update at rates 0", "then it is 1")
    exact: tuple[PrecisionName, ...] = ("fp32", "bf16_master")
    for precision in exact:
        trial = subject.trial(precision)
        trial.update(1, subject.rates, count_unchanged=True)
        trial.update(2, subject.rates, count_unchanged=True)
        if (found := trial.method.unchanged) is not None:
            raise subject.broken(f"`unchanged` is {found} in {precision}", "where no update is lost it is None")
