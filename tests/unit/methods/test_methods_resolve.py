"""What a recipe leaves out is filled in, each value with its source; what is wrong with the method is told at once."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field

from blockllm_cli.errors import RecipeError
from blockllm_cli.footprint import TensorPlan
from blockllm_cli.methods import resolve as resolving
from blockllm_cli.methods.adamw import AdamW
from blockllm_cli.methods.base import Hyperparameters, MethodFacts, MethodOptions, Rates, Setting
from blockllm_cli.methods.registry import method_names
from blockllm_cli.methods.resolve import (
    Resolved,
    assumed_config,
    nearest_hyperparameters,
    resolve,
    resolve_recipe,
    vocabulary_is_known,
)
from blockllm_cli.model.config import SIZES, llama_config
from blockllm_cli.optim.precision import precision_of
from blockllm_cli.recipe.dump import dump_recipe
from blockllm_cli.recipe.load import load_recipe
from blockllm_cli.recipe.sections import Model


class FakeOptions(MethodOptions):
    rank: int = Field(default=4, ge=1, description="Width of the projection.")
    scale: float = Field(default=1.0, gt=0, description="Factor.")
    mode: Literal["left", "right"] = Field(default="left", description="Side.")
    groups: list[str] | None = Field(default=None, description="Expressions.")
    layerwise: bool | None = Field(default=None, description="Inside the backward pass.")


class Fake(AdamW):
    """A method with published values of every kind, which refuses shapes where it is told to."""

    name = "fake"
    Options = FakeOptions
    given: ClassVar[list[Setting]] = []

    def __init__(self, options: FakeOptions, setting: Setting) -> None:
        self._options = options
        self.given.append(setting)

    def plan(self, shapes: Mapping[str, tuple[int, ...]]) -> list[TensorPlan]:
        if self._options.rank > shapes["model.embed_tokens.weight"][1]:
            raise RecipeError(f"method.rank = {self._options.rank}: is more than the width")
        return []

    facts: ClassVar[MethodFacts] = MethodFacts(
        title="Fake",
        summary="s",
        paper="p",
        family="f",
        keeps="k",
        layerwise="any",
        hyperparameters={
            "60m": Hyperparameters(1e-2, dense_rate=5e-3, clip=0.5, options={"rank": 128}, source="the paper"),
            "1b": Hyperparameters(1e-4, options={"rank": 512}),
        },
    )


@pytest.fixture(autouse=True)
def with_fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `fake` be a method, and an empty folder the current one."""
    real = resolving.method_class
    monkeypatch.setattr(resolving, "method_names", lambda: [*method_names(), "fake"])
    monkeypatch.setattr(resolving, "method_class", lambda name: Fake if name == "fake" else real(name))
    monkeypatch.chdir(tmp_path)


def fake(*overrides: str, options: str = "", size: str = "60m") -> Resolved:
    argument = f"fake:{options}" if options else "fake"
    return resolve_recipe(f"c4/{size}", overrides=overrides, method=argument)


def refusal(*overrides: str, method: str = "fake", recipe: str = "c4/60m") -> str:
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(recipe, overrides=overrides, method=method)
    return str(caught.value)


def test_rates_clip_and_options_come_from_the_nearest_size_and_say_so() -> None:
    resolved = fake()
    schedule = resolved.recipe.schedule
    # clip is in the recipe, and the recipe holds
    assert (schedule.learning_rate, schedule.dense_rate, schedule.clip) == (1e-2, 5e-3, 0.0)
    assert resolved.options == FakeOptions(rank=128)
    for key in ("schedule.learning_rate", "schedule.dense_rate", "method.rank"):
        assert resolved.comments[key] == "from: fake, 60m, the paper"
    assert "schedule.clip" not in resolved.comments
    assert resolved.comments["method.scale"] == "default of fake"
    assert resolved.comments["method.seed"] == "derived from run.seed"
    assert resolved.comments["data.workers"] == "default"
    assert resolved.recipe.method == {"name": "fake", "seed": 246321551, "rank": 128, "scale": 1.0, "mode": "left"}


def test_the_nearest_size_is_by_ratio_of_parameters() -> None:
    assert fake(size="130m").options.rank == 128
    assert fake(size="350m").options.rank == 512  # 3.6 times below 1b, 6.3 times above 60m
    assert fake(size="7b").recipe.schedule.dense_rate is None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vocabulary", [320, 32_000, 250_000])
def test_a_published_size_is_nearest_to_itself_with_any_vocabulary(size: str, vocabulary: int) -> None:
    facts = MethodFacts("t", "s", "p", "f", "k", {known: Hyperparameters(1e-3) for known in SIZES})
    config = llama_config(Model(size=size, vocab_size=vocabulary), tokenizer_vocab_size=1)
    assert nearest_hyperparameters(facts, config)[0] == size


def test_a_method_without_sizes_has_values_for_any() -> None:
    facts = MethodFacts("t", "s", "p", "f", "k", {"*": Hyperparameters(3e-3)})
    config = llama_config(Model(size="7b"), tokenizer_vocab_size=1)
    assert nearest_hyperparameters(facts, config) == ("any size", Hyperparameters(3e-3))


def test_what_the_recipe_gives_holds() -> None:
    resolved = fake(
        "schedule.learning_rate=0.5", "schedule.dense_rate=0.25", "method.seed=7", "model.seed=8", options="rank=3"
    )
    schedule = resolved.recipe.schedule
    assert (schedule.learning_rate, schedule.dense_rate) == (0.5, 0.25)
    assert (resolved.options.rank, resolved.method_seed, resolved.recipe.model.seed) == (3, 7, 8)
    assert not {"schedule.learning_rate", "schedule.dense_rate", "method.rank", "model.seed"} & set(resolved.comments)


def test_r30_one_seed_gives_three_and_each_can_be_set_alone() -> None:
    def seeds(*overrides: str) -> tuple[int | None, int | None, int]:
        resolved = fake(*overrides)
        return resolved.recipe.model.seed, resolved.recipe.data.seed, resolved.method_seed

    first = seeds()
    assert len(set(first)) == 3
    assert not set(first) & set(seeds("run.seed=1"))
    assert seeds("model.seed=5") == (5, *first[1:])
    assert seeds("data.seed=5") == (first[0], 5, first[2])
    assert seeds("method.seed=5") == (*first[:2], 5)


@pytest.mark.parametrize("method", ["fake", "fake:groups=a", *method_names()])
@pytest.mark.parametrize("recipe", ["quickstart", "c4/7b"])
def test_a_resolved_recipe_resolves_to_itself(method: str, recipe: str) -> None:
    resolved = resolve_recipe(recipe, method=method)
    Path("resolved.toml").write_text(dump_recipe(resolved.recipe, resolved.comments), encoding="utf-8")
    again = resolve(load_recipe("resolved.toml"))
    assert again.recipe == resolved.recipe
    assert again.options == resolved.options


def test_the_warmup_stays_as_it_was_written() -> None:
    assert fake("schedule.warmup=0.25").recipe.schedule.warmup == 0.25
    assert fake("schedule.warmup=25").recipe.schedule.warmup == 25


def test_precision_is_decided_once() -> None:
    resolved = resolve_recipe("quickstart", overrides=["run.precision=auto"])
    decided = resolved.with_precision("bf16", "measured")
    assert decided.recipe.run.precision == "bf16"
    assert decided.comments["run.precision"] == "measured"
    assert resolved.recipe.run.precision == "auto"
    assert decided.with_precision("bf16", "again") is decided


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ("mode=right", {"mode": "right"}),
        ("mode='right'", {"mode": "right"}),
        ("scale=2", {"scale": 2.0}),
        ("groups=a.b", {"groups": ["a.b"]}),
        ("groups=12", {"groups": ["12"]}),
        ("groups=[\"a\",'b,c']", {"groups": ["a", "b,c"]}),
        ("rank=1_0", {"rank": 10}),
    ],
)
def test_flags_are_read_as_the_type_of_the_option(options: str, values: dict) -> None:
    assert fake(options=options).options == FakeOptions(**{"rank": 128, **values})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("rnk=3", "method.rnk = 3: fake has no such option; did you mean rank?"),
        ("rank-=3", "did you mean rank?"),
        ("alpha=3", "fake has no such option; [method] has name, seed, rank, scale, mode, groups, layerwise"),
        ("learning_rate=3", "learning_rate belongs to [schedule]"),
        ("lr=3", "did you mean learning_rate of [schedule]?"),
        ("betas=3", "fake has no such option; [method] has"),
        ("rank=0", "method.rank = 0: must be an integer of at least 1 (Width of the projection)"),
        ("rank=1.5", "must be an integer of at least 1, not a number with a fraction"),
        ("rank=true", "not a boolean"),
        ("rank='3'", "write 3 without quotes"),
        ("scale=nan", "must be a number above 0"),
        ("mode=up", 'method.mode = "up": must be "left" or "right"'),
        ("seed=-1", "method.seed = -1: must be an integer in [0,"),
        ("seed=x", "must be an integer in [0,"),
    ],
)
def test_r29_mistakes_in_the_method_table(options: str, expected: str) -> None:
    message = refusal(method=f"fake:{options}")
    assert message.startswith(f"--method fake:{options}: ")
    assert expected in message


def test_a_mistake_in_a_file_has_its_line_and_a_method_its_nearest_name() -> None:
    Path("my.toml").write_text(
        '[model]\nsize = "9m"\n[tokenizer]\nvocab_size = 512\n[data]\nsequence_length = 8\n[batch]\nrows = 1\n'
        '[schedule]\nsteps = 3\n[method]\nname = "adamv"\nbeta = 3\n',
        encoding="utf-8",
    )
    with pytest.raises(RecipeError, match=r'^my\.toml:12: method\.name = "adamv": there is no such method; did you'):
        resolve(load_recipe("my.toml"))
    path = Path("my.toml")
    path.write_text(path.read_text(encoding="utf-8").replace("adamv", "adamw"), encoding="utf-8")
    with pytest.raises(
        RecipeError, match=r"^my\.toml:13: method\.beta = 3: adamw has no such option; did you mean betas"
    ):
        resolve(load_recipe("my.toml"))


def test_every_problem_is_in_one_message_whatever_finds_it() -> None:
    message = refusal("batch.row=3", "model.num_attention_heads=7", method="fake:rank=0,mod=left")
    assert message.startswith("4 problems:\n")
    for part in (
        "batch.row is no key",
        "model.num_attention_heads is 7, which does not divide",
        "method.rank",
        "method.mod",
    ):
        assert part in message
    assert refusal("batch.rows=x", method="nope").startswith("2 problems:")
    assert "batch.rows" in refusal("batch.rows=x", "model.size=60")


def test_r28_a_tokenizer_to_be_trained_larger_than_the_model_is_refused_with_both_numbers() -> None:
    message = refusal("model.vocab_size=256", "tokenizer.vocab_size=300", recipe="quickstart")
    assert "--set model.vocab_size=256: model.vocab_size is 256, but the tokenizer has 300 pieces" in message
    resolve_recipe("quickstart", overrides=["model.vocab_size=320", "tokenizer.vocab_size=300"])


def test_the_architecture_is_known_as_far_as_the_tokenizer_is() -> None:
    def config_of(*overrides: str):
        recipe = load_recipe("quickstart", overrides=overrides).recipe
        config = assumed_config(recipe.model, recipe.tokenizer, error=lambda key, text, *, fix="": RecipeError(text))
        return config.vocab_size, vocabulary_is_known(recipe.model, recipe.tokenizer)

    assert config_of() == (4096, True)
    assert config_of("tokenizer.vocab_size=300") == (320, True)
    assert config_of("tokenizer.source=file", "tokenizer.path=x") == (32_000, False)
    assert config_of("tokenizer.source=file", "tokenizer.path=x", "model.vocab_size=99") == (99, True)


def test_a_method_knows_the_peak_rates_the_passes_and_whether_it_may_write_early() -> None:
    def setting(*overrides: str) -> Setting:
        fake(*overrides).method(precision_of("bf16"))
        return Fake.given[-1]

    sets = ("schedule.learning_rate=0.5", "method.seed=7", "batch.rows=8", "batch.micro_rows=2")
    expected = Setting(7, precision_of("bf16"), 4, peak=Rates(0.5, 5e-3), layerwise_allowed=True)
    assert setting(*sets) == expected
    assert setting(*sets, "run.on_nonfinite=skip") == replace(expected, layerwise_allowed=False)
    # 7b has no dense rate of its own
    assert fake("schedule.learning_rate=0.5", size="7b").method(precision_of("fp32")) is not None
    assert Fake.given[-1].peak == Rates(0.5, 0.5)


def test_options_that_do_not_fit_the_shapes_are_refused_at_their_place() -> None:
    assert refusal(method="fake:rank=513") == "--method fake:rank=513: method.rank = 513: is more than the width"
    assert fake(options="rank=512").options.rank == 512
    # Without the tokenizer the shapes are not known.
    resolve_recipe("quickstart", overrides=["tokenizer.source=file", "tokenizer.path=x"], method="fake:rank=513")


ONE_PASS = ("batch.micro_rows=512", "batch.rows=512")


NEVER = "fake cannot update inside the backward pass; leave it out"
TWO_PASSES = "all 512 rows, and one pass has batch.micro_rows = 256 of them; leave one of the two out"


@pytest.mark.parametrize(
    ("kind", "overrides", "expected"),
    [
        ("any", ONE_PASS, None),
        ("scale_invariant", ONE_PASS, None),
        ("never", ONE_PASS, NEVER),
        ("any", ("batch.rows=512", "batch.micro_rows=256"), TWO_PASSES),
        ("scale_invariant", ("batch.rows=512", "batch.micro_rows=256"), TWO_PASSES),
        ("any", (*ONE_PASS, "run.on_nonfinite=skip"), 'set run.on_nonfinite = "stop"'),
        ("scale_invariant", (*ONE_PASS, "run.on_nonfinite=skip"), 'set run.on_nonfinite = "stop"'),
        ("any", (*ONE_PASS, "schedule.clip=0.5"), "schedule.clip = 0.5 limits"),
        ("scale_invariant", (*ONE_PASS, "schedule.clip=0.5"), None),
    ],
)
def test_r03_updates_inside_the_backward_pass_where_they_cannot_be_exact(
    kind: str, overrides: tuple[str, ...], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fake, "facts", replace(Fake.facts, layerwise=kind))
    # Left to the method, or off, nothing is refused.
    fake(*overrides)
    fake(*overrides, options="layerwise=false")
    if expected is None:
        assert fake(*overrides, options="layerwise=true").options.layerwise is True
        return
    text = refusal(*overrides, method="fake:layerwise=true")
    assert text.startswith("--method fake:layerwise=true: method.layerwise = true: ")
    assert expected in text


def test_r03_every_reason_against_it_is_told_at_once() -> None:
    sets = ("batch.rows=512", "batch.micro_rows=256", "run.on_nonfinite=skip", "schedule.clip=0.5")
    assert refusal(*sets, method="fake:layerwise=true").startswith("3 problems:\n")


def test_r03_a_method_without_the_option_says_that_it_cannot() -> None:
    expected = "method.layerwise = true: adamw cannot update inside the backward pass; leave it out"
    assert refusal(method="adamw:layerwise=true").endswith(expected)


def test_a_default_that_a_variant_sets_says_so():
    comments = resolve_recipe("quickstart", method="blockllm:variant=paper,sparsity=0.5").comments
    assert comments["method.mask"] == "default of blockllm, variant paper"
    assert "method.sparsity" not in comments
    assert resolve_recipe("quickstart", method="blockllm").comments["method.mask"] == "default of blockllm"
