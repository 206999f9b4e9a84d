"""The length of a run in updates, and of its warm-up. Pure functions of the recipe."""

from __future__ import annotations

from blockllm_cli.recipe.sections import Batch, Data, Recipe, Schedule


def total_steps(recipe: Recipe) -> int:
    """Updates of the run: `schedule.steps`, or as many as it takes to reach `schedule.tokens` slots."""
    return steps_of(recipe.schedule, recipe.batch, recipe.data)


def steps_of(schedule: Schedule, batch: Batch, data: Data) -> int:
    """Updates of a run with these three tables.

    Raises:
        ValueError: neither steps nor tokens is given.
    """
    if schedule.steps is not None:
        return schedule.steps
    if schedule.tokens is None:
        raise ValueError("the schedule has neither steps nor tokens")
    return -(-schedule.tokens // (batch.rows * data.sequence_length))


def warmup_steps(recipe: Recipe) -> int:
    """Updates of the warm-up: the integer given, or the share of all updates, to the nearest but never all."""
    warmup = recipe.schedule.warmup
    if isinstance(warmup, int):
        return warmup
    steps = total_steps(recipe)
    return min(round(warmup * steps), steps - 1)


def slots_per_update(recipe: Recipe) -> int:
    """Input positions of one update, padding included."""
    return recipe.batch.rows * recipe.data.sequence_length
