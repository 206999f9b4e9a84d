"""Extended files, `--method` and `--set`: which value holds, and how mistakes in them are told."""

from pathlib import Path

import pytest

from blockllm_cli.errors import RecipeError
from blockllm_cli.recipe.flatten import flattened
from blockllm_cli.recipe.load import load_recipe

BASE = """\
# The base.

[run]
seed = 1 # one
deterministic = true # two
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
warmup = 0.2
[method]
name = "adamw"
eps = 1e-6
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with base.toml in `sub/`."""
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("sub/base.toml").write_text(BASE, encoding="utf-8")
    return tmp_path


def child(text: str) -> Path:
    path = Path("child.toml")
    path.write_text('extends = "sub/base.toml"\n' + text, encoding="utf-8")
    return path


def message(path: Path, **arguments) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, **arguments)
    return str(caught.value)


def test_precedence_is_extended_file_then_file_then_method_then_set() -> None:
    path = child("[run]\nseed = 2\nname = 'c'\n[method]\neps = 1e-5\n")
    recipe = load_recipe(path).recipe
    assert (recipe.run.seed, recipe.run.name, recipe.run.deterministic) == (2, "c", True)
    assert recipe.method == {"name": "adamw", "eps": 1e-5}
    loaded = load_recipe(path, method="sgd:momentum=0.5", overrides=["run.seed=3", "method.momentum=0.6", "run.seed=4"])
    assert loaded.recipe.run.seed == 4
    assert loaded.recipe.method == {"name": "sgd", "momentum": 0.6}
    assert str(loaded.origins["method.name"]) == "--method sgd:momentum=0.5"
    assert str(loaded.origins["run.deterministic"]) == "sub/base.toml:5"
    assert "method.eps" not in loaded.origins


def test_another_method_in_a_later_layer_leaves_no_option_of_the_earlier_one() -> None:
    assert load_recipe(child("[method]\nname = 'sgd'\n")).recipe.method == {"name": "sgd"}
    assert load_recipe(child(""), overrides=["method.name=sgd"]).recipe.method == {"name": "sgd"}
    assert load_recipe(child("[method]\nname = 'adamw'\n")).recipe.method == {"name": "adamw", "eps": 1e-6}


def test_a_later_layer_gives_the_length_in_its_own_way() -> None:
    path = child("[schedule]\ntokens = 1000000\n")
    assert (load_recipe(path).recipe.schedule.steps, load_recipe(path).recipe.schedule.tokens) == (None, 1_000_000)
    schedule = load_recipe(path, overrides=["schedule.steps=7"]).recipe.schedule
    assert (schedule.steps, schedule.tokens, schedule.warmup) == (7, None, 0.2)
    assert "beside" in message(path, overrides=["schedule.steps=7", "schedule.tokens=9"])


@pytest.mark.parametrize(("rows", "micro_rows"), [("16", None), ("256", 256), ("512", 256)])
def test_fewer_rows_than_a_pass_had_are_one_pass(rows: str, micro_rows: int | None) -> None:
    """R26: `--set batch.rows=16` means 16 rows, also over a recipe that cuts its 512 into passes of 256."""
    assert load_recipe("c4/60m", overrides=[f"batch.rows={rows}"]).recipe.batch.micro_rows == micro_rows


@pytest.mark.parametrize("overrides", [["batch.rows=300"], ["batch.rows=16", "batch.micro_rows=64"], ["batch.rows=x"]])
def test_rows_that_passes_do_not_divide_are_refused_all_the_same(overrides: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"batch\.(micro_)?rows"):
        load_recipe("c4/60m", overrides=overrides)


def test_a_later_layer_that_changes_the_source_drops_what_belonged_to_the_old_one() -> None:
    tokenizer = load_recipe(child(""), overrides=["tokenizer.source=file", "tokenizer.path=x"]).recipe.tokenizer
    assert (tokenizer.source, tokenizer.path, tokenizer.vocab_size) == ("file", "x", None)
    same = load_recipe(child(""), overrides=["tokenizer.source=train"]).recipe.tokenizer
    assert same.vocab_size == 4096
    files = child("[data]\ncorpus = 'files'\ntrain = 'x'\nvalidation = 'y'\n")
    data = load_recipe(files, overrides=["data.corpus=builtin"]).recipe.data
    assert (data.train, data.validation, data.sequence_length) == (None, None, 128)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("run.name=a b", "a b"),
        ("run.name='a b'", "a b"),
        ('run.name="a\\tb"', "a\tb"),
        ("run.name=3", "3"),
        ("run.name=none", "none"),
        ("run.name=a=b,c", "a=b,c"),
        ("run.name = x ", "x"),
        ("run.seed=1_000", 1000),
        ("run.deterministic=false", False),
        ("run.precision=fp32", "fp32"),
        ("schedule.warmup=5", 5),
        ("schedule.warmup=0.25", 0.25),
        ("schedule.clip=1", 1.0),
        ("schedule.learning_rate=3e-4", 3e-4),
    ],
)
def test_set_reads_text_as_the_type_of_the_field(text: str, value: object) -> None:
    recipe = load_recipe(child(""), overrides=[text]).recipe
    table, key = text.partition("=")[0].strip().split(".")
    found = getattr(getattr(recipe, table), key)
    assert (found, type(found)) == (value, type(value))


def test_set_takes_a_list_as_a_toml_array_or_as_one_string() -> None:
    files = child("[data]\ncorpus = 'files'\ntrain = 'x'\n")
    for text, value in (("a/*.gz", ("a/*.gz",)), ('["a", "b,c"]', ("a", "b,c")), ('"a"', ("a",)), ("[a]x", ("[a]x",))):
        assert load_recipe(files, overrides=[f"data.train={text}"]).recipe.data.train == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run.seed", "--set run.seed: --set takes table.key=value"),
        ("seed=3", "--set takes table.key=value"),
        (".seed=3", "--set takes table.key=value"),
        ("runs.seed=3", "runs is no table of a recipe; did you mean run?"),
        ("run.sede=3", "--set run.sede=3: run.sede is no key of a recipe; did you mean seed?"),
        ("run.learning_rate=3", "learning_rate belongs to [schedule]"),
        ("batch.micro-rows=3", "did you mean micro_rows?"),
        ("run.seed=none", '--set run.seed=none: run.seed = "none": must be an integer'),
        ("run.seed=1e3", "write 1000"),
        ("run.deterministic=True", "must be true or false"),
        ("run.deterministic=1", "must be true or false"),
        ("run.seed=1\nx = 2", "must be an integer"),
        ("run.name=", "run.name"),
        ("batch.rows.x=3", "batch.rows.x is no key"),
    ],
)
def test_r29_mistakes_in_set(text: str, expected: str) -> None:
    assert expected in message(child(""), overrides=[text])


def test_method_flag_replaces_the_table_and_splits_outside_brackets_and_quotes_only() -> None:
    argument = "adamw:betas=[0.8, 0.9],eps=1e-4,mode='a,b',groups=[\"x,y\", 'z'],flag=true,word=bare"
    assert load_recipe(child(""), method=argument).recipe.method == {
        "name": "adamw",
        "betas": [0.8, 0.9],
        "eps": 1e-4,
        "mode": "a,b",
        "groups": ["x,y", "z"],
        "flag": True,
        "word": "bare",
    }
    assert load_recipe(child(""), method="adamw").recipe.method == {"name": "adamw"}
    assert load_recipe(child(""), method="007").recipe.method == {"name": "007"}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("", "--method takes NAME"),
        (":a=1", "--method takes NAME"),
        ("adamw:", "is no key=value"),
        ("adamw:eps", '"eps" is no key=value'),
        ("adamw:eps=1,,b=2", "is no key=value"),
        ("adamw:eps=1,eps=2", "method.eps is given twice"),
    ],
)
def test_mistakes_in_the_method_flag(argument: str, expected: str) -> None:
    assert expected in message(child(""), method=argument)


def test_r29_a_mistake_in_an_extended_file_has_the_file_and_line_of_that_file() -> None:
    Path("sub/base.toml").write_text(BASE.replace("rows = 16", "row = 16"), encoding="utf-8")
    text = message(child("[run]\nsede = 3\n"))
    assert "sub/base.toml:13: batch.row = 16: there is no such key; did you mean rows?" in text
    assert "child.toml:3: run.sede = 3: there is no such key; did you mean seed?" in text


def test_extends_is_relative_to_the_extending_file() -> None:
    Path("sub/deep").mkdir()
    Path("sub/deep/a.toml").write_text('extends = "../b.toml"\n[run]\nname = "a"', encoding="utf-8")
    Path("sub/b.toml").write_text('extends = "base.toml"\n[run]\nname = "b"\nseed = 9', encoding="utf-8")
    run = load_recipe("sub/deep/a.toml").recipe.run
    assert (run.name, run.seed, run.deterministic) == ("a", 9, True)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('extends = "nope.toml"', 'child.toml:2: extends = "nope.toml": nope.toml does not exist'),
        ('extends = "sub"', "sub is a folder"),
        ("extends = 3", "child.toml:2: extends must be the path of a recipe as a string, not an integer"),
        ('extends = ""', "extends must be the path"),
        ('extends = "child.toml"', "in a circle: child.toml -> child.toml"),
        ('extends = "sub/../child.toml"', "in a circle"),
        ('extends = "back.toml"', "in a circle: child.toml -> back.toml -> child.toml"),
    ],
)
def test_mistakes_in_extends(line: str, expected: str) -> None:
    Path("back.toml").write_text('extends = "child.toml"\n', encoding="utf-8")
    Path("child.toml").write_text(f"\n{line}\n", encoding="utf-8")
    assert expected in message(Path("child.toml"))


@pytest.mark.parametrize(
    "text",
    [
        "[run]\nname = 'c' # mine\n",
        "[schedule]\ntokens = 99999 # few\nwarmup = 3\n",
        "[method]\nname = 'sgd'\nmomentum = 0.5\n",
        "[tokenizer]\nsource = 'file'\npath = 'x'\n[evaluate]\nevery = 5\n",
        "[run]\ndeterministic = false # bare\n",
    ],
)
def test_a_flattened_recipe_is_the_recipe_in_one_file(text: str) -> None:
    path = child(text)
    flat = flattened(path)
    Path("flat.toml").write_text(flat, encoding="utf-8")
    assert "extends" not in flat
    assert load_recipe("flat.toml").recipe == load_recipe(path).recipe
    assert "# one" in flat
    assert all(comment in flat for comment in ("# mine", "# few", "# bare") if comment in text)


@pytest.mark.parametrize(
    "text",
    [
        "batch = {rows = 3, micro_rows = 1}\n",
        "batch.rows = 3\nrun.seed = 5\n",
        "[run]\nname = 'x'\n[method]\nname = 'sgd'\n[schedule]\nsteps = 3\n",
    ],
)
def test_other_ways_to_write_a_table_lose_at_most_their_comments(text: str) -> None:
    path = child(text)
    Path("flat.toml").write_text(flattened(path), encoding="utf-8")
    assert load_recipe("flat.toml").recipe == load_recipe(path).recipe
    Path("sub/inline.toml").write_text('run = {seed = 4}\nextends = "base.toml"\n', encoding="utf-8")
    Path("child.toml").write_text('extends = "sub/inline.toml"\n' + text, encoding="utf-8")
    Path("flat.toml").write_text(flattened(path), encoding="utf-8")
    assert load_recipe("flat.toml").recipe == load_recipe(path).recipe


def test_a_recipe_that_extends_nothing_is_flat_as_it_is() -> None:
    assert flattened(Path("sub/base.toml")) == BASE
