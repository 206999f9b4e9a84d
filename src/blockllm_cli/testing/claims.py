"""Checks of what a method says about itself: facts, options, and what it refuses."""

from __future__ import annotations

import math
import re
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from blockllm_cli.errors import RecipeError
from blockllm_cli.methods.base import Hyperparameters
from blockllm_cli.model.config import SIZES
from blockllm_cli.testing.subject import Subject
from blockllm_cli.testing.tiny import tiny_config

NOTHING = "matches-no-tensor"


def states_its_facts(subject: Subject) -> None:
    """Facts are complete and honest: texts, sizes, published values, described options, variants."""
    kind, facts = subject.kind, subject.kind.facts
    if not re.fullmatch(r"[a-z][a-z0-9_]*", kind.name):
        raise subject.broken(f"its name is {kind.name!r}", "a name is lower-case letters, digits and _")
    for word in ("title", "summary", "paper", "family", "keeps"):
        if not getattr(facts, word).strip():
            raise subject.broken(f"`facts.{word}` is empty", "it says something")
    if facts.cycle.updates < 1:
        raise subject.broken(f"`facts.cycle.updates` is {facts.cycle.updates}", "it is at least 1")
    if not facts.hyperparameters or (unknown := facts.hyperparameters.keys() - SIZES.keys() - {"*"}):
        raise subject.broken(
            f"`facts.hyperparameters` is for {sorted(unknown)}" if facts.hyperparameters else "it publishes no rates",
            f"there is at least one, each for one of {', '.join(SIZES)}, or * for any size",
        )
    for size, values in facts.hyperparameters.items():
        _check_published(subject, size, values)
    _check_options(subject)


def _check_published(subject: Subject, size: str, values: Hyperparameters) -> None:
    rates = [values.learning_rate, *([] if values.dense_rate is None else [values.dense_rate])]
    if min(rates) <= 0 or values.clip < 0:
        raise subject.broken(
            f"the values for {size} are rates {rates}, clip {values.clip}", "rates are above 0, clip at least 0"
        )
    if not values.source.startswith("ours") and not re.search(r"arXiv|\d{4}", values.source):
        raise subject.broken(
            f"the values for {size} are from {values.source!r}",
            'a source is a citation with its year, or begins "ours"',
        )
    try:
        subject.kind.Options(**values.options)
    except ValidationError as error:
        raise subject.broken(f"the options for {size} are refused: {error}", "published options are valid") from error


def _check_options(subject: Subject) -> None:
    kind = subject.kind
    fields = kind.Options.model_fields
    if reserved := sorted({"name", "seed"} & fields.keys()):
        raise subject.broken(f"there is an option {reserved[0]}", "name and seed belong to every method")
    for key, field in fields.items():
        if not (field.description or "").strip():
            raise subject.broken(f"the option {key} has no description", "each says what it is, its unit and its range")
        if field.is_required():
            raise subject.broken(f"the option {key} has no default", "a recipe need only name the method")
    variant = fields.get("variant")
    words = () if variant is None else get_args(variant.annotation)
    if tuple(kind.facts.variants) != words or (variant is not None and words[0] != variant.default):
        raise subject.broken(
            f"`facts.variants` is {kind.facts.variants}, the option variant takes {words}",
            "they are the same, the default first",
        )


def trains_something(subject: Subject) -> None:
    """Nothing to train is an error: the method trains at least one tensor, and refuses patterns that match none."""
    if not subject.trained():
        raise subject.broken("`trains` is false for every tensor of a Llama", "a method trains at least one")
    for key, field in subject.kind.Options.model_fields.items():
        if not _is_patterns(field.annotation) or not subject.has_option(key):
            continue
        try:
            subject.with_options(**{key: (NOTHING,)}).method().plan(tiny_config().parameter_shapes())
        except (RecipeError, ValidationError):
            continue
        raise subject.broken(
            f'the option {key} = ["{NOTHING}"], which matches no tensor, is accepted',
            "a pattern that matches nothing is an error when the plan is made",
        )


def _is_patterns(annotation: Any) -> bool:
    return get_origin(annotation) in (tuple, list) and get_args(annotation)[0] is str


def has_a_pure_rate_factor(subject: Subject) -> None:
    """`rate_factor` is a pure function of the update: finite, not negative, the same for a fresh method."""
    steps = [1, 2, 3, 10, 100, 1000, 3, 2, 1]
    trial = subject.trial()
    trial.run((1, 2), subject.rates)
    used, fresh = trial.method, subject.method()
    for step in steps:
        factor, again = used.rate_factor(step), fresh.rate_factor(step)
        if factor != again or not math.isfinite(factor) or factor < 0:
            raise subject.broken(
                f"`rate_factor({step})` is {factor} after two updates, {again} before any",
                "it depends on the update's number and the options alone, is finite and at least 0",
            )
