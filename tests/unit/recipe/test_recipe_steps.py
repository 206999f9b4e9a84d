"""Length of run and warm-up, and the seeds that derive from one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockllm_cli.recipe.load import load_recipe
from blockllm_cli.recipe.sections import Recipe
from blockllm_cli.recipe.seeds import derived_seed
from blockllm_cli.recipe.steps import slots_per_update, steps_of, total_steps, warmup_steps


def recipe_of(**schedule) -> Recipe:
    quickstart = load_recipe("quickstart").recipe  # 16 rows of 128
    cleared = quickstart.schedule.model_copy(update={"steps": None, **schedule})
    return quickstart.model_copy(update={"schedule": cleared})


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (2048, 1), (2049, 2), (204_800, 100), (204_801, 101)])
def test_a_budget_of_tokens_counts_slots_and_is_reached(tokens: int, steps: int) -> None:
    assert total_steps(recipe_of(tokens=tokens)) == steps
    assert slots_per_update(recipe_of(tokens=tokens)) == 2048


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [
        (0, 100, 0),
        (10, 100, 10),
        (1, 100, 1),
        (0.1, 600, 60),
        (0.1, 15, 2),
        (0.29, 100, 29),
        (0.0, 9, 0),
        (0.9, 3, 2),
        (0.5, 1, 0),
    ],
)
def test_a_warmup_is_updates_or_a_share_of_them(warmup: float, steps: int, expected: int) -> None:
    assert warmup_steps(recipe_of(steps=steps, warmup=warmup)) == expected


@settings(deadline=None)
@given(st.integers(1, 10**6), st.floats(0, 1, exclude_max=True))
def test_a_share_never_takes_the_whole_run(steps: int, share: float) -> None:
    assert 0 <= warmup_steps(recipe_of(steps=steps, warmup=share)) < steps


def test_a_schedule_without_length_is_refused() -> None:
    recipe = recipe_of()
    with pytest.raises(ValueError, match="neither steps nor tokens"):
        steps_of(recipe.schedule, recipe.batch, recipe.data)


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1))
def test_r30_streams_have_seeds_of_their_own(seed: int) -> None:
    seeds = [derived_seed(seed, stream) for stream in ("model", "data", "method")]
    assert len(set(seeds)) == 3
    assert all(0 <= one < 2**32 for one in seeds)
    assert seeds == [derived_seed(seed, stream) for stream in ("model", "data", "method")]


def test_derived_seeds_stay_what_they_are() -> None:
    assert [derived_seed(0, stream) for stream in ("model", "data", "method")] == [2967367733, 272697876, 246321551]
    assert derived_seed(1, "model") != derived_seed(0, "model")
