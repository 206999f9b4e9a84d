"""Checks of what an update does to the weights: which move, how far, and at whose rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blockllm_cli.methods.base import Rates
from blockllm_cli.model.llama import LlamaForCausalLM
from blockllm_cli.model.weights import load_weights
from blockllm_cli.testing.comparing import first_difference, moved, norm_of
from blockllm_cli.testing.subject import PRECISIONS, Subject, Trial, is_dense, of_few_batches, scaled
from blockllm_cli.testing.tiny import tiny_batch, tiny_config, tiny_llama

UPDATES = 25
FALL = 0.97
"""What the loss has to fall to, as a share of what it began with."""


def descends(subject: Subject) -> None:
    """The loss falls in every precision."""
    paces = subject.paces()
    for precision in PRECISIONS:
        best = math.inf
        for pace in list(paces):
            losses = [
                each.loss for each in subject.trial(precision).run(range(1, UPDATES + 1), pace, batch=of_few_batches)
            ]
            best = min(best, sum(losses[-5:]) / sum(losses[:5]))
            if best < FALL:
                paces.sort(key=lambda other: other is not pace)
                break
        else:
            tried = ", ".join(f"{pace.body:g}/{pace.dense:g}" for pace in paces)
            raise subject.broken(
                f"in {precision}, the mean loss of the last 5 of {UPDATES} updates is at best {best:.3f} times that of "
                f"the first 5 (body/dense rates tried: {tried})",
                f"it falls below {FALL} times",
            )


def moves_what_it_trains(subject: Subject) -> None:
    """Each trained tensor moves within a cycle, and no other moves."""
    for tied in (False, True):
        trained = subject.trained(tied=tied)
        for precision in PRECISIONS:
            still = set(trained)
            for pace in subject.paces():
                trial = subject.trial(precision, tied=tied)
                before = trial.weights()
                trial.run(range(1, subject.updates + 1), pace)
                now_moved = moved(before, trial.weights())
                if wrong := sorted(now_moved - trained):
                    raise subject.broken(
                        f"{wrong[0]} moved within {subject.updates} updates in {precision} ({len(wrong)} such tensors)",
                        "a tensor moves only if `trains` says so",
                    )
                still -= now_moved
                if not still:
                    break
            if still:
                raise subject.broken(
                    f"{min(still)} did not move within {subject.updates} updates in {precision} "
                    f"({len(still)} such tensors{', tied head' if tied else ''})",
                    "every tensor of which `trains` says so moves within `facts.cycle`",
                )


def uses_both_rates(subject: Subject) -> None:
    """Each rate reaches its own tensors in every update, and nothing moves at a rate of zero."""
    pace = subject.paces()[0]
    for word, rates in (("body", Rates(pace.body, 0.0)), ("dense", Rates(0.0, pace.dense))):
        trial, reached = subject.trial(), set()
        for step in range(1, max(subject.updates, 3) + 1):
            before = trial.weights()
            trial.update(step, rates)
            now_moved = moved(before, trial.weights())
            if wrong := sorted(name for name in now_moved if is_dense(name) == (word == "body")):
                raise subject.broken(
                    f"{wrong[0]} moved in update {step}, when only the {word} rate was not 0",
                    "embedding, head and norms move at `rates.dense`, all else at `rates.body`",
                )
            reached |= now_moved
        awaited = subject.trained() if subject.is_cycle else set()
        if unreached := sorted(name for name in awaited - reached if is_dense(name) == (word == "dense")):
            raise subject.broken(
                f"{unreached[0]} did not move in {step} updates at {word} rate {getattr(rates, word):g}",
                f"the {word} rate moves it",
            )
    trial = subject.trial()
    trial.run((1, 2), pace)
    before = trial.weights()
    trial.update(3, Rates(0.0, 0.0))
    if wrong := sorted(moved(before, trial.weights())):
        raise subject.broken(f"{wrong[0]} moved in update 3 at rates 0", "an update uses the rates that it is given")


def moves_in_proportion_to_the_rate(subject: Subject) -> None:
    """Twice the rate is twice the change in the first update, and about twice in a later one."""
    rates = subject.rates
    once, twice = (_change(subject, 1, scaled(rates, factor)) for factor in (1.0, 2.0))
    for name, change in once.items():
        difference = (twice[name] - 2 * change).abs()
        if (difference > 1e-6 + 1e-3 * twice[name].abs()).any():
            worst = difference.argmax()
            raise subject.broken(
                f"{name}: at rates {rates.body:g}/{rates.dense:g} an entry moved by {change.view(-1)[worst]:.4g} in "
                f"update 1, at twice the rates by {twice[name].view(-1)[worst]:.4g}",
                "the first change is proportional to the rate",
            )
    once, twice = (_change(subject, 3, scaled(rates, factor)) for factor in (1.0, 2.0))
    near, far = norm_of(once.values()), norm_of(twice.values())
    if not 1.5 * near <= far <= 2.5 * near:
        raise subject.broken(
            f"update 3 moved the weights by {near:.4g} at rates {rates.body:g}/{rates.dense:g}, by {far:.4g} at twice "
            "the rates",
            "every update uses the rates that it is given, so that twice the rate moves about twice as far",
        )


def _change(subject: Subject, step: int, rates: Rates) -> dict[str, Tensor]:
    """What update `step` changes at `rates`, after updates at the published ones."""
    trial = subject.trial()
    trial.run(range(1, step), subject.rates)
    before = trial.weights()
    trial.update(step, rates)
    return {name: value - before[name] for name, value in trial.weights().items()}


def writes_from_what_it_chose(subject: Subject) -> None:
    """An update is written from the tensors of `choose`, which the trainer checks and scales."""
    changes = []
    for factor in (1.0, 0.0):
        trial = subject.trial(layerwise_allowed=False)
        before = trial.weights()
        asked = trial.ask(1, subject.rates)
        for key, value in asked.chosen.items():
            if not trial.method.trains(parameter := key.partition("@")[0]):
                raise subject.broken(f"`choose` returned {key!r}", f"{parameter} does not train, so it is not chosen")
            value.mul_(factor)
        trial.method.update(1, subject.rates, asked.chosen, asked.loss)
        changes.append({name: value - before[name] for name, value in trial.weights().items()})
    whole, left = changes
    if subject.kind.facts.layerwise == "scale_invariant":
        # What does not change with the length of its gradient may be written beside the chosen tensors.
        left = {name: torch.where(change == whole[name], 0.0, change) for name, change in left.items()}
    if norm_of(left.values()) > 0.1 * norm_of(whole.values()):
        worst = max(left, key=lambda name: norm_of([left[name]]))
        raise subject.broken(
            f"with every chosen tensor set to 0, update 1 still moved the weights by {norm_of(left.values()):.3g}, "
            f"{worst} most ({norm_of(whole.values()):.3g} with them as they are)",
            "`update` writes from `chosen`, so that clipping has its effect",
        )


def gives_plain_weights(subject: Subject) -> None:
    """`merged_weights` are those of a plain Llama, finite, and no copies where none are needed."""
    for tied in (False, True):
        trial = subject.trial(tied=tied)
        trial.run(range(1, 4), subject.rates)
        merged = trial.method.merged_weights(trial.model)
        shapes = tiny_config(tied=tied).parameter_shapes()
        if (found := {name: tuple(value.shape) for name, value in merged.items()}) != shapes:
            raise subject.broken(
                f"`merged_weights` gives {first_difference(found, shapes)} of what it gives and what a Llama has",
                "names and shapes are those of Hugging Face's Llama, a tied head left out",
            )
        _check_finite(subject, trial, merged, tied=tied)
        for name, parameter in trial.model.named_parameters():
            if torch.equal(merged[name], parameter) and merged[name].data_ptr() != parameter.data_ptr():
                raise subject.broken(f"`merged_weights` copies {name}", "no copy is made where none is needed")


def _check_finite(subject: Subject, trial: Trial, merged: dict[str, Tensor], *, tied: bool) -> None:
    plain: LlamaForCausalLM = tiny_llama(tied=tied)
    load_weights(plain, {name: value.detach() for name, value in merged.items()})
    nll, _ = plain.row_nll(tiny_batch(1))
    if not torch.isfinite(nll).all():
        raise subject.broken(
            f"after 3 updates at rates {subject.rates.body:g}/{subject.rates.dense:g} a plain Llama with the "
            f"`merged_weights` has a loss of {nll.tolist()}",
            "at its published rates a method keeps the weights finite",
        )
    if difference := first_difference(merged, trial.method.merged_weights(trial.model)):
        raise subject.broken(f"asked twice for `merged_weights`: {difference}", "asking changes nothing")
