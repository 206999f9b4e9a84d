"""The recipes that come with the package: all found, all valid, all as the papers say."""

import re

import pytest

from blockllm_cli.recipe.flatten import flattened
from blockllm_cli.recipe.load import load_recipe
from blockllm_cli.recipe.shipped import shipped_folder, shipped_names, shipped_path, summary_of
from blockllm_cli.recipe.steps import total_steps, warmup_steps

NAMES = shipped_names()
C4 = [name for name in NAMES if name.startswith("c4/")]


def test_every_file_is_a_recipe_or_is_extended_by_one() -> None:
    files = {path.relative_to(shipped_folder()).with_suffix("").as_posix() for path in shipped_folder().rglob("*.toml")}
    assert files - set(NAMES) == {"c4/_papers"}
    assert {"quickstart", "c4/60m", "c4/130m", "c4/350m", "c4/1b", "c4/7b"} <= set(NAMES)
    assert C4 == ["c4/60m", "c4/130m", "c4/350m", "c4/1b", "c4/7b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_valid_and_copies_to_one_that_stands_alone(name: str, tmp_path) -> None:
    loaded = load_recipe(name)
    copy = tmp_path / "copy.toml"
    copy.write_text(flattened(loaded.path), encoding="utf-8")
    assert load_recipe(copy).recipe == loaded.recipe
    assert 10 < len(summary_of(name)) < 120


@pytest.mark.parametrize("name", ["quickstart", *C4])
def test_every_key_of_a_shipped_recipe_is_explained(name: str) -> None:
    for line in flattened(shipped_path(name)).splitlines():
        if re.match(r"\w+ = ", line) and not line.startswith("name = "):
            assert "#" in line, line


@pytest.mark.parametrize(
    ("size", "steps", "micro_rows", "clip"),
    [
        ("60m", 10_000, 256, 0),
        ("130m", 20_000, 256, 0),
        ("350m", 60_000, 128, 0),
        ("1b", 100_000, 16, 0),
        ("7b", 150_000, 8, 1),
    ],
)
def test_the_papers_protocol(size: str, steps: int, micro_rows: int, clip: float) -> None:
    recipe = load_recipe(f"c4/{size}").recipe
    assert (recipe.model.size, recipe.model.vocab_size) == (size, 32_000)
    assert (recipe.batch.rows, recipe.batch.micro_rows) == (512, micro_rows)
    assert (recipe.data.corpus, recipe.data.sequence_length, recipe.data.layout) == ("c4", 256, "truncate")
    assert (total_steps(recipe), warmup_steps(recipe)) == (steps, steps // 10)
    assert (recipe.schedule.shape, recipe.schedule.min_ratio, recipe.schedule.clip) == ("cosine", 0.1, clip)
    assert (recipe.schedule.learning_rate, recipe.schedule.dense_rate) == (None, None)
    assert recipe.model.checkpoint_activations == (size == "7b")


def test_the_papers_recipes_can_be_run_on_local_text() -> None:
    overrides = ["data.corpus=files", "data.train=DIR/*.jsonl", "tokenizer.source=train", "tokenizer.vocab_size=32000"]
    recipe = load_recipe("c4/60m", overrides=overrides).recipe
    assert recipe.data.train == ("DIR/*.jsonl",)
    assert (recipe.tokenizer.source, recipe.tokenizer.path) == ("train", None)
