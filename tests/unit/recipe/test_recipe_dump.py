"""A dumped recipe loads back equal; its hash depends on the values alone."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockllm_cli.recipe.dump import dump_recipe, recipe_sha256, written_values
from blockllm_cli.recipe.load import load_recipe
from blockllm_cli.recipe.sections import Recipe

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8)
FINITE = st.floats(1e-300, 1e300)
TOKENIZERS = st.one_of(
    st.fixed_dictionaries(
        {"vocab_size": st.integers(260, 99999)}, optional={"kind": st.sampled_from(["bpe", "unigram"])}
    ),
    st.fixed_dictionaries({"source": st.sampled_from(["file", "hub"]), "path": TEXT}),
)
CORPORA = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"corpus": st.just("files"), "train": st.lists(TEXT, min_size=1, max_size=3)}),
    st.just({"corpus": "c4"}),
)
RECIPES = st.fixed_dictionaries(
    {
        "run": st.fixed_dictionaries({}, optional={"name": TEXT, "seed": st.integers(0, 2**63 - 1)}),
        "model": st.fixed_dictionaries({}, optional={"size": TEXT, "rms_norm_eps": FINITE}),
        "tokenizer": TOKENIZERS,
        "data": st.tuples(CORPORA, st.integers(2, 9999)).map(lambda pair: {**pair[0], "sequence_length": pair[1]}),
        "batch": st.fixed_dictionaries({"rows": st.integers(1, 99)}),
        "schedule": st.fixed_dictionaries(
            {"steps": st.integers(1000, 2000)},
            optional={"warmup": st.one_of(st.integers(0, 999), st.floats(0, 0.999)), "learning_rate": FINITE},
        ),
        "method": st.dictionaries(
            TEXT, st.one_of(st.integers(-9, 9), FINITE, TEXT, st.lists(st.floats(0, 1))), max_size=3
        ),
        "tracking": st.fixed_dictionaries({}, optional={"log_rows": st.booleans()}),
    }
)


@settings(deadline=None, max_examples=40)
@given(RECIPES, TEXT)
def test_a_dumped_recipe_loads_back_to_the_equal_recipe(tmp_path_factory: Any, values: dict, comment: str) -> None:
    values["method"]["name"] = "adamw"
    recipe = Recipe.model_validate(values)
    comments = {f"{table}.{key}": comment for table, section in written_values(recipe).items() for key in section}
    path = tmp_path_factory.mktemp("dump") / "recipe.toml"
    path.write_text(dump_recipe(recipe, comments), encoding="utf-8", newline="\n")
    again = load_recipe(path).recipe
    assert again == recipe
    assert recipe_sha256(again) == recipe_sha256(recipe)


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("quickstart").recipe


def test_comments_stand_behind_their_values_and_booleans_are_no_exception(recipe: Recipe) -> None:
    text = dump_recipe(recipe, {"batch.rows": "why\nnot", "tracking.log_rows": "default", "batch.micro_rows": "absent"})
    assert "rows = 16 # why not\n" in text
    assert "log_rows = false # default\n" in text
    assert "absent" not in text


def test_keys_that_nothing_reads_are_not_written() -> None:
    text = dump_recipe(load_recipe("c4/60m").recipe, {})
    assert set(tomllib.loads(text)["tokenizer"]) == {"source", "path"}


def test_the_hash_follows_every_value_and_nothing_else(recipe: Recipe, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    text = dump_recipe(recipe, {"batch.rows": "a comment"})
    tables = text.strip().split("\n\n")
    other.write_text("\n\n\n".join(reversed(tables)), encoding="utf-8")
    assert recipe_sha256(load_recipe(other).recipe) == recipe_sha256(recipe)
    options = [{"name": "adamw", "eps": 1e-6}, {"eps": 1e-6, "name": "adamw"}]
    assert len({recipe_sha256(recipe.model_copy(update={"method": table})) for table in options}) == 1
    changed = [
        recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": 1})}),
        recipe.model_copy(update={"method": {"name": "adamw", "eps": 1e-6}}),
        recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_rows": 16})}),
    ]
    assert len({recipe_sha256(one) for one in [recipe, *changed]}) == 4
