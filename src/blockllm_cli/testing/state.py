"""Checks of what a checkpoint holds of a method: exact through disk, plain, by name, and strict when it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from blockllm_cli.errors import InputError
from blockllm_cli.model.weights import load_weights
from blockllm_cli.optim.precision import PrecisionName, Rounding
from blockllm_cli.testing.comparing import first_difference, shortened
from blockllm_cli.testing.subject import PRECISIONS, Subject, Trial
from blockllm_cli.training.checkpoint import Checkpoint, open_checkpoint, save_checkpoint

UPDATES = 8
MANY = 10


def resumes_to_the_bit(subject: Subject) -> None:
    """N updates are k, a resume through disk in fresh objects, and N - k, bit for bit."""
    _resume(subject, "fp32", "nearest", (1, 3, 4, 6))
    for precision in PRECISIONS[1:]:
        _resume(subject, precision, "nearest", (3,))
        _resume(subject, precision, "stochastic", (5,))


def _resume(subject: Subject, precision: PrecisionName, rounding: Rounding, stops: tuple[int, ...]) -> None:
    def fresh() -> Trial:
        return subject.trial(precision, rounding=rounding)

    unbroken = fresh()
    losses: list[float] = []
    with TemporaryDirectory() as folder:
        saved = {}
        for step in range(1, UPDATES + 1):
            losses.append(unbroken.update(step, subject.rates).loss)
            if step in stops:
                saved[step] = _save(unbroken, Path(folder), step)
        for step, checkpoint in saved.items():
            resumed = fresh()
            if step == stops[-1]:
                resumed.update(1, subject.rates)  # what was there before must not matter
            _load(subject, resumed, checkpoint)
            where = f"{precision}, {rounding} rounding: {step} updates, a resume and {UPDATES - step} more"
            rest = [each.loss for each in resumed.run(range(step + 1, UPDATES + 1), subject.rates)]
            difference = (
                first_difference(_by_update(losses[step:], step), _by_update(rest, step))
                or first_difference(unbroken.weights(), resumed.weights())
                or first_difference(unbroken.method.state_dict(), resumed.method.state_dict())
            )
            if difference:
                raise subject.broken(
                    f"{where} against {UPDATES} in one go: {difference}",
                    "`state_dict` holds everything that steers a later update",
                )


def _by_update(losses: list[float], done: int) -> dict[str, float]:
    return {f"the loss of update {step}": loss for step, loss in enumerate(losses, done + 1)}


def _save(trial: Trial, folder: Path, step: int) -> Checkpoint:
    weights = dict(trial.model.named_parameters())
    state = trial.method.state_dict()
    return open_checkpoint(save_checkpoint(folder, step=step, weights=weights, method_state=state, state={}, keep=MANY))


def _load(subject: Subject, trial: Trial, checkpoint: Checkpoint) -> None:
    state = checkpoint.method()
    load_weights(trial.model, checkpoint.weights())
    trial.method.load_state_dict(state)
    if difference := first_difference(dict(state), trial.method.state_dict()):
        raise subject.broken(f"after `load_state_dict`, what was loaded and `state_dict`: {difference}", "they agree")


def says_plain_things(subject: Subject) -> None:
    """State is tensors under parameter names and plain JSON values; events are plain JSON values."""
    for precision in PRECISIONS:
        trial = subject.trial(precision)
        events = [event for each in trial.run(range(1, UPDATES + 1), subject.rates) for event in each.events]
        parameters = dict(trial.model.named_parameters())
        for key, value in trial.method.state_dict().items():
            owner = key.rpartition(".")[0].partition("@")[0]
            if isinstance(value, Tensor):
                if "." in key and owner not in parameters:
                    raise subject.broken(
                        f"`state_dict` has the key {key!r}", "keys are `<parameter name>.<state name>`, or a bare word"
                    )
            elif not _is_plain(value):
                raise subject.broken(
                    f"`state_dict` has {key!r}: {shortened(value)}, which JSON does not give back as it is",
                    "what is no tensor is a plain JSON value (lists, no tuples; text keys; finite numbers)",
                )
        for event in events:
            if not isinstance(event.get("kind"), str) or not _is_plain(event):
                raise subject.broken(
                    f"`update` returned the event {shortened(event)}",
                    "an event is a table of plain JSON values with a `kind`",
                )


def _is_plain(value: object) -> bool:
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


def loads_strictly(subject: Subject) -> None:
    """A state that does not fit is refused by an InputError that names the tensor, and both shapes or dtypes."""
    trial = subject.trial()
    trial.run(range(1, 4), subject.rates)
    state = trial.method.state_dict()
    for what, broken, words in _misfits(state):
        try:
            subject.trial().method.load_state_dict(broken)
        except InputError as error:
            if missing := [word for word in words if word not in str(error)]:
                raise subject.broken(
                    f"a state in which {what} is refused, but not by naming {missing[0]!r}: {error}",
                    "the message names the tensor and both shapes or dtypes",
                ) from error
        except Exception as error:
            raise subject.broken(
                f"loading a state in which {what} raised {type(error).__name__}: {error}",
                "what does not fit is an InputError",
            ) from error
        else:
            raise subject.broken(f"a state in which {what} was loaded without complaint", "it is an InputError")


def _misfits(state: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """What is wrong, the state, and words that the message has to have."""
    foreign = "model.layers.9.mlp.up_proj.weight.exp_avg"
    yield f"{foreign} is too much", {**state, foreign: torch.zeros(2)}, (foreign,)
    for key in state:
        yield f"{key} is missing", {name: value for name, value in state.items() if name != key}, (key,)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    # One of each kind of state tensor.
    for key, value in {key.rpartition(".")[2]: (key, value) for key, value in tensors.items()}.values():
        shape, dtype = tuple(value.shape), value.dtype
        other = torch.float64 if dtype != torch.float64 else torch.float32
        yield f"{key} is no tensor", {**state, key: 1.0}, (key,)
        yield f"{key} has another shape", {**state, key: value.new_zeros(3, 5, 2)}, (key, "(3, 5, 2)", str(shape))
        yield f"{key} is {other}", {**state, key: value.to(other)}, (key, f"{other}", f"{dtype}")
