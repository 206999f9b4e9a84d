"""Loading a recipe: what is valid, what is refused, and that the refusal names file, line, key, value and way out."""

from pathlib import Path

import pytest

from blockllm_cli.errors import RecipeError
from blockllm_cli.recipe.load import LoadedRecipe, load_recipe
from blockllm_cli.recipe.names import SYNONYMS
from blockllm_cli.recipe.sections import SECTIONS

MINIMAL = """\
[model]
size = "60m"
[tokenizer]
vocab_size = 4096
[data]
sequence_length = 128
[batch]
rows = 16
[schedule]
steps = 100
[method]
name = "adamw"
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write `text` to my.toml in an empty folder and load it from there."""
    monkeypatch.chdir(tmp_path)

    def write_and_load(text: str, **arguments) -> LoadedRecipe:
        Path("my.toml").write_text(text, encoding="utf-8")
        return load_recipe("my.toml", **arguments)

    return write_and_load


def refusal(load, text: str, **arguments) -> list[str]:
    """The lines of the message with which `text` is refused, without the count."""
    with pytest.raises(RecipeError) as caught:
        load(text, **arguments)
    lines = str(caught.value).split("\n")
    return [line.strip() for line in (lines[1:] if len(lines) > 1 else lines)]


def with_line(after: str, line: str) -> str:
    """MINIMAL with `line` put behind the line `after`."""
    assert after in MINIMAL.split("\n")
    return MINIMAL.replace(after + "\n", f"{after}\n{line}\n")


def test_a_minimal_recipe_has_the_documented_defaults(load) -> None:
    recipe = load(MINIMAL).recipe
    assert (recipe.run.precision, recipe.run.on_nonfinite, recipe.run.rounding) == ("auto", "stop", "nearest")
    assert (recipe.schedule.shape, recipe.schedule.min_ratio, recipe.schedule.learning_rate) == ("cosine", 0.1, None)
    assert (recipe.evaluate.at_start, recipe.data.block_documents, recipe.data.max_bad_documents) == (True, 4096, 100)
    assert recipe.method == {"name": "adamw"}


def test_origins_name_file_and_line_of_what_was_given_and_nothing_else(load) -> None:
    origins = load(MINIMAL, overrides=["run.seed=3"]).origins
    assert str(origins["batch.rows"]) == "my.toml:8"
    assert str(origins["run.seed"]) == "--set run.seed=3"
    assert "data.workers" not in origins


@pytest.mark.parametrize(
    ("after", "line", "expected"),
    [
        ("[batch]", "row = 3", "my.toml:8: batch.row = 3: there is no such key; did you mean rows?"),
        (
            "[batch]",
            "micro-rows = 4",
            "my.toml:8: batch.micro-rows = 4: there is no such key; did you mean micro_rows?",
        ),
        ("[batch]", "learning_rate = 1e-3", "learning_rate belongs to [schedule]"),
        ("[batch]", "name = 'x'", "name belongs to [run]"),
        ("[model]", "dtype = 'bf16'", "did you mean precision of [run]?"),
        ("[schedule]", "lr = 1e-3", "did you mean learning_rate?"),
        ("[schedule]", "alpha = 1", "[schedule] has steps, tokens,"),
        ("[batch]", "vocab_siz = 3", "did you mean vocab_size of [model]?"),
        ("[data]", "'train.x' = 1", "my.toml:6: data.train.x = 1: there is no such key"),
    ],
)
def test_r29_an_unknown_key_is_named_with_the_one_that_was_meant(load, after: str, line: str, expected: str) -> None:
    (message,) = refusal(load, with_line(after, line))
    assert expected in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[bacth]\nrows = 3", "my.toml:1: bacth is no table of a recipe; did you mean batch?"),
        ("rows = 3", "my.toml:1: rows is no table of a recipe; rows belongs to [batch] or [evaluate]"),
        ("learning-rate = 3", "learning_rate belongs to [schedule]"),
        ("lr = 3", "did you mean learning_rate of [schedule]?"),
        ("[zzz]", "the tables are run, model,"),
        ("run = 3", "my.toml:1: run is an integer and must be a table; write [run]"),
        ("extend = 'x.toml'", "did you mean extends?"),
    ],
)
def test_r29_a_word_at_the_top_that_is_no_table(load, line: str, expected: str) -> None:
    (message,) = refusal(load, line + "\n" + MINIMAL)
    assert expected in message


@pytest.mark.parametrize(
    ("table", "line", "expected"),
    [
        ("run", 'seed = "1"', 'seed = "1": must be an integer in [0, 9223372036854775807], not a string'),
        ("run", 'seed = "1"', "write 1 without quotes"),
        ("run", "seed = true", "not a boolean"),
        ("run", "seed = 1.0", "write 1"),
        ("run", "seed = -1", "must be an integer in [0,"),
        ("run", "seed = 9223372036854775808", "must be an integer in [0,"),
        ("run", "name = 3", "must be a string, not an integer"),
        ("run", 'name = ""', "must be a string"),
        ("run", "name = 2024-01-01", "not a date or time"),
        ("run", 'device = "gpu"', 'must be "auto", "cpu", "cuda", "cuda:N" or "mps"'),
        ("run", 'precision = "fp16"', 'must be "auto", "fp32", "bf16", "bf16_master" or "bf16_papers"'),
        ("run", "deterministic = 1", "must be true or false, not an integer"),
        ("run", "deterministic = 'true'", "write true without quotes"),
        ("run", "threads = 0", "must be an integer of at least 1"),
        ("evaluate", "every = {x = 1}", "not a table"),
        ("evaluate", "tokens = [1]", "not a list"),
        ("checkpoint", "keep = 0", "must be an integer of at least 1"),
        ("tracking", "log_every = inf", "must be an integer of at least 1"),
    ],
)
def test_a_value_of_the_wrong_kind_or_range(load, table: str, line: str, expected: str) -> None:
    (message,) = refusal(load, f"{MINIMAL}[{table}]\n{line}\n")
    assert message.startswith(f"my.toml:14: {table}.{line.split()[0]} = ")
    assert expected in message


@pytest.mark.parametrize("value", ["nan", "inf", "true", "'0.1'", "-0.1"])
@pytest.mark.parametrize("key", ["clip", "learning_rate", "min_ratio", "warmup"])
def test_a_rate_is_a_finite_number(load, key: str, value: str) -> None:
    (message,) = refusal(load, with_line("[schedule]", f"{key} = {value}"))
    assert f"my.toml:10: schedule.{key} = " in message


def test_an_integer_is_a_number_and_keeps_its_meaning_for_the_warmup(load) -> None:
    schedule = load(with_line("[schedule]", "warmup = 10\nclip = 1")).recipe.schedule
    assert (schedule.warmup, type(schedule.warmup)) == (10, int)
    assert (schedule.clip, type(schedule.clip)) == (1.0, float)
    assert load(with_line("[schedule]", "warmup = 0.5")).recipe.schedule.warmup == 0.5


def test_globs_are_one_string_or_a_list(load) -> None:
    files = MINIMAL.replace("[data]", '[data]\ncorpus = "files"\ntrain = {}')
    assert load(files.replace("{}", '"a/*.json"')).recipe.data.train == ("a/*.json",)
    assert load(files.replace("{}", '["a", "b"]')).recipe.data.train == ("a", "b")
    for value in ("[]", '[""]', "[1]", "3", '""'):
        (message,) = refusal(load, files.replace("{}", value))
        assert "my.toml:7: data.train = " in message
        assert "must be a list of strings" in message


@pytest.mark.parametrize("table", ["batch", "method", "schedule", "data", "model"])
def test_a_missing_table_names_what_it_must_have(load, table: str) -> None:
    head, _, tail = MINIMAL.partition(f"[{table}]\n")
    text = head + tail.partition("\n")[2]
    if table == "model":  # whether the architecture is complete is judged with the sizes, above this layer
        assert load(text).recipe.model.size is None
        return
    (message,) = refusal(load, text)
    needed = {"batch": "rows", "method": "name", "schedule": "steps", "data": "sequence_length"}[table]
    assert message.startswith(f"my.toml: {table}.{needed} is missing")


def test_every_problem_is_in_one_message_in_the_order_of_the_file(load) -> None:
    text = MINIMAL.replace("rows = 16", "row = 16").replace("steps = 100", "steps = 0").replace('"60m"', "60")
    lines = refusal(load, text, overrides=["run.sede=1"])
    assert [line.split(": ")[0] for line in lines] == [
        "my.toml:2",
        "my.toml:7",
        "my.toml:8",
        "my.toml:10",
        "--set run.sede=1",
    ]
    with pytest.raises(RecipeError, match=r"^5 problems:\n"):
        load(text, overrides=["run.sede=1"])


def test_r26_rows_that_do_not_divide_are_refused_with_the_numbers_and_the_nearest_that_fit(load) -> None:
    (message,) = refusal(load, with_line("[batch]", "micro_rows = 4").replace("rows = 16", "rows = 10"))
    assert message == (
        "my.toml:8: batch.micro_rows is 4, which does not divide batch.rows 10 (10 / 4 = 2.5 passes); "
        "the nearest that fit are micro_rows 2 or 5, or rows 8 or 12"
    )
    (message,) = refusal(load, MINIMAL, overrides=["batch.micro_rows=32"])
    assert "micro_rows 16, or rows 32" in message
    (message,) = refusal(load, MINIMAL, overrides=["batch.rows=1000000007", "batch.micro_rows=2"])
    assert "micro_rows 1 or 1000000007, or rows 1000000006 or 1000000008" in message


@pytest.mark.parametrize(
    ("warmup", "steps", "problem"),
    [
        ("100", 100, "is 100 updates, and the run has 100"),
        ("1.0", 100, "is 1.0, and a share must be below 1; write 1 to count updates"),
        ("2.5", 100, "is 2.5, and a share must be below 1"),
        ("1", 1, "is 1 updates, and the run has 1"),
    ],
)
def test_a_warmup_leaves_something_of_the_run(load, warmup: str, steps: int, problem: str) -> None:
    text = with_line("[schedule]", f"warmup = {warmup}").replace("steps = 100", f"steps = {steps}")
    (message,) = refusal(load, text)
    assert f"my.toml:10: schedule.warmup {problem}" in message


def test_a_length_is_given_once(load) -> None:
    (message,) = refusal(load, with_line("[schedule]", "tokens = 5"))
    assert "my.toml:10: schedule.tokens is 5 beside steps = 100" in message
    tokens = MINIMAL.replace("steps = 100", "tokens = 20480\nwarmup = 10")
    (message,) = refusal(load, tokens)  # 20,480 slots are 10 updates of 16 x 128
    assert "schedule.warmup is 10 updates, and the run has 10" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            with_line("[tokenizer]", 'source = "file"\npath = "x"'),
            'vocab_size = 4096: nothing reads it with source = "file"',
        ),
        (with_line("[tokenizer]", 'path = "x"'), 'goes with "file" or "hub"; leave it out, or change tokenizer.source'),
        (with_line("[data]", 'train = "x"'), 'nothing reads it with corpus = "builtin": it goes with "files"'),
        (with_line("[data]", 'corpus = "files"'), 'data.train is missing, and corpus = "files" reads it'),
        (MINIMAL.replace("vocab_size = 4096", 'source = "hub"'), "tokenizer.path is missing"),
        (MINIMAL.replace("vocab_size = 4096", ""), "tokenizer.vocab_size is missing"),
    ],
)
def test_r29_keys_that_nothing_would_read_or_that_are_needed(load, text: str, expected: str) -> None:
    (message,) = refusal(load, text)
    assert expected in message


def test_a_recipe_is_frozen_and_refuses_unknown_keys_in_python_too(load) -> None:
    recipe = load(MINIMAL).recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.batch.rows = 3
    with pytest.raises(ValueError, match="Extra inputs"):
        SECTIONS["batch"](rows=3, row=3)


def test_every_key_says_what_it_means() -> None:
    for table, section in SECTIONS.items():
        for key, field in section.model_fields.items():
            assert field.description, f"{table}.{key}"


def test_words_of_other_tools_lead_to_keys_that_exist() -> None:
    for word, key in SYNONYMS.items():
        table, name = key.split(".")
        assert table == "method" or name in SECTIONS[table].model_fields, word
        assert all(word not in section.model_fields for section in SECTIONS.values()), word


def test_error_of_a_loaded_recipe_names_file_line_key_value_problem_and_fix(load) -> None:
    loaded = load(MINIMAL, overrides=["run.seed=3"])
    assert isinstance(loaded.error("batch.rows", "too many"), RecipeError)
    assert str(loaded.error("batch.rows", "too many", fix="take 8")) == "my.toml:8: batch.rows = 16: too many; take 8"
    assert str(loaded.error("batch.rows", "is 16, which is even")) == "my.toml:8: batch.rows is 16, which is even"
    assert str(loaded.error("batch.micro_rows", "is missing")) == "my.toml:7: batch.micro_rows is missing"
    assert str(loaded.error("run.device", "is not here")) == 'my.toml: run.device = "auto": is not here'
    assert str(loaded.error("run.seed", "odd")) == "--set run.seed=3: run.seed = 3: odd"
    assert str(loaded.error("method.name", "old")) == 'my.toml:12: method.name = "adamw": old'
