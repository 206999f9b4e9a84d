"""From a loaded recipe to one that leaves nothing open: the method's options, its published rates, the seeds.

What the recipe gives holds. What it leaves out is filled from the method's facts for the nearest model size, and
every filled value is noted with its source. A resolved recipe resolves to itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import Field

from blockllm_cli.errors import RecipeError
from blockllm_cli.methods.base import Hyperparameters, Method, MethodFacts, MethodOptions, Rates, Setting
from blockllm_cli.methods.registry import method_class, method_names, suggest_method
from blockllm_cli.model.config import LlamaConfig, llama_config
from blockllm_cli.model.initial import with_initial_architecture
from blockllm_cli.optim.precision import Precision, precision_of
from blockllm_cli.recipe.files import shown
from blockllm_cli.recipe.kinds import parse_text
from blockllm_cli.recipe.load import Draft, LoadedRecipe, check_table, read_draft
from blockllm_cli.recipe.names import did_you_mean
from blockllm_cli.recipe.origins import Origin, Problem, joined, origin_of
from blockllm_cli.recipe.sections import SECTIONS, SEED_LIMIT, Model, PrecisionWord, Recipe, Section, Tokenizer
from blockllm_cli.recipe.seeds import derived_seed

UNKNOWN_VOCABULARY = 32_000
"""Stands for the pieces of a tokenizer that has not been read yet: those of the papers' models."""

_NOT_IN_BACKWARD = "cannot update inside the backward pass"


@dataclass(frozen=True)
class Resolved:
    """A recipe with nothing left open.

    Attributes:
        recipe: all values, those filled in included; `method` is the full table of the method.
        loaded: what it was made from, and where that stands.
        method_class: the method.
        options: its options, typed.
        comments: `table.key` -> where a value that the recipe does not give came from.
    """

    recipe: Recipe
    loaded: LoadedRecipe
    method_class: type[Method]
    options: MethodOptions
    comments: Mapping[str, str]

    @property
    def method_seed(self) -> int:
        """Seed of the method's draws: its own if it was given one, else derived from `run.seed`."""
        return int(self.recipe.method["seed"])

    @property
    def micro_batches(self) -> int:
        """Backward passes per update."""
        batch = self.recipe.batch
        return batch.rows // (batch.micro_rows or batch.rows)

    def method(self, precision: Precision) -> Method:
        """The method, with what it has to know of the run; nothing is allocated."""
        schedule = self.recipe.schedule
        assert schedule.learning_rate is not None  # filled by `resolve`
        body = schedule.learning_rate
        return self.method_class(
            self.options,
            Setting(
                self.method_seed,
                precision,
                self.micro_batches,
                peak=Rates(body, body if schedule.dense_rate is None else schedule.dense_rate),
                layerwise_allowed=self.recipe.run.on_nonfinite != "skip",
            ),
        )

    def placed(self, error: RecipeError) -> RecipeError:
        """An error of the method, which knows no file, with the place of the key that its text begins with."""
        key = re.match(r"method\.\w+", str(error))
        place = origin_of(key[0] if key else "method", self.loaded.origins, Origin(shown(self.loaded.path)))
        return RecipeError(f"{place}: {error}")

    def with_precision(self, name: PrecisionWord, note: str = "") -> Resolved:
        """The same with `run.precision` decided; `note` says how, if it was not given."""
        if name == self.recipe.run.precision:
            return self
        run = self.recipe.run.model_copy(update={"precision": name})
        comments = {**self.comments, "run.precision": note or "auto, as decided for this machine"}
        return replace(self, recipe=self.recipe.model_copy(update={"run": run}), comments=MappingProxyType(comments))


class CommonKeys(Section):
    """Keys of `[method]` that every method has beside its own options and `name`."""

    seed: int | None = Field(
        None, ge=0, le=SEED_LIMIT, description="Seed of the method's own draws. Absent: derived from run.seed."
    )


def resolve_recipe(path: str | Path, *, overrides: Sequence[str] = (), method: str | None = None) -> Resolved:
    """Load and resolve a recipe, so that one message names everything wrong with it. Arguments as `load_recipe`.

    Raises:
        RecipeError: with one line per problem.
    """
    draft = read_draft(path, overrides=overrides, method=method)
    problems = [*draft.problems, *_draft_problems(draft)]
    if problems:
        raise RecipeError(joined(problems))
    return resolve(draft.finish())


def resolve(loaded: LoadedRecipe) -> Resolved:
    """Fill what the recipe leaves out, and check its method.

    Raises:
        RecipeError: the method, one of its options or the architecture is refused; one line per problem.
    """
    _check_run_seed(loaded)
    given = loaded.recipe.model
    recipe = loaded.recipe.model_copy(update={"model": with_initial_architecture(given, loaded.error)})
    loaded = replace(loaded, recipe=recipe)
    config = assumed_config(recipe.model, recipe.tokenizer, error=loaded.error)
    method = _class_of(recipe.method["name"], loaded.line)
    size, published = nearest_hyperparameters(method.facts, config)
    options, problems = _options(method, recipe.method, loaded.texts, published)
    if options is None or problems:
        raise RecipeError(joined([loaded.line(problem) for problem in problems]))
    source = f"from: {method.name}, {size}, {published.source}"
    sections, comments = _filled_sections(loaded, published, source)
    variant = getattr(options, "variant", None)
    comments.update({f"model.{key}": f"from model.init, {given.init}" for key in _filled(given, recipe.model)})
    default = f"default of {method.name}" + (f", variant {variant}" if variant in method.facts.variants[1:] else "")
    for key in set(type(options).model_fields) - set(recipe.method):
        comments[f"method.{key}"] = source if key in published.options else default
    seed = recipe.method.get("seed")
    if seed is None:
        seed = derived_seed(recipe.run.seed, "method")
        comments["method.seed"] = "derived from run.seed"
    table = {"name": method.name, "seed": seed, **options.model_dump(mode="json", exclude_none=True)}
    filled = recipe.model_copy(update={**sections, "method": table})
    resolved = Resolved(filled, loaded, method, options, MappingProxyType(comments))
    problems = list(_layerwise_problems(resolved))
    if problems:
        raise RecipeError(joined([loaded.line(problem) for problem in problems]))
    _check_plan(resolved, config)
    return resolved


def _filled(given: Section, now: Section) -> list[str]:
    """Keys of a table that have a value now and had none."""
    fields = type(now).model_fields
    return [key for key in fields if getattr(given, key) is None and getattr(now, key) is not None]


def _layerwise_problems(resolved: Resolved) -> Iterator[Problem]:
    """Why the run cannot have the updates inside the backward pass that its recipe asks for."""
    if not getattr(resolved.options, "layerwise", None):
        return
    recipe, name, facts = resolved.recipe, resolved.method_class.name, resolved.method_class.facts
    key = "method.layerwise"
    if facts.layerwise == "never":
        yield Problem(key, f"{name} {_NOT_IN_BACKWARD}", "leave it out")
        return
    if resolved.micro_batches > 1:
        yield Problem(
            key,
            f"an update needs the gradient of all {recipe.batch.rows} rows, and one pass has batch.micro_rows = "
            f"{recipe.batch.micro_rows} of them",
            "leave one of the two out",
        )
    if recipe.run.on_nonfinite == "skip":
        yield Problem(
            key,
            'by the time an update is found to be not finite, part of it is written, and run.on_nonfinite = "skip" '
            "would have to undo it",
            'leave layerwise out, or set run.on_nonfinite = "stop"',
        )
    if facts.layerwise == "any" and recipe.schedule.clip:
        yield Problem(
            key,
            f"the norm that schedule.clip = {recipe.schedule.clip:g} limits is known after the backward pass only, and "
            f"an update by {name} depends on the length of its gradient",
            "leave layerwise out, or set schedule.clip = 0",
        )


def _check_plan(resolved: Resolved, config: LlamaConfig) -> None:
    """Refuse options that do not fit the shapes of the model, if these are known before the tokenizer is read."""
    recipe = resolved.recipe
    if not vocabulary_is_known(recipe.model, recipe.tokenizer):
        return
    name = recipe.run.precision
    try:
        resolved.method(precision_of("fp32" if name == "auto" else name, recipe.run.rounding)).plan(
            config.parameter_shapes()
        )
    except RecipeError as error:
        raise resolved.placed(error) from error


def _check_run_seed(loaded: LoadedRecipe) -> None:
    """Refuse a flag that changes nothing: a recipe that gives all three seeds, as that in a run folder does."""
    origin = loaded.origins.get("run.seed")
    derived = ("model.seed", "data.seed", "method.seed")
    if origin is not None and origin.line is None and all(key in loaded.origins for key in derived):
        raise loaded.error(
            "run.seed",
            f"has no effect, since the recipe gives {', '.join(derived)} itself",
            fix="set those, or take a recipe without them",
        )


def assumed_config(model: Model, tokenizer: Tokenizer, *, error: Callable[..., RecipeError]) -> LlamaConfig:
    """The architecture, as far as it is known before the tokenizer is.

    A tokenizer that is still to be trained has the pieces asked for; of one that is still to be read only what
    `model.vocab_size` says is known, else `UNKNOWN_VOCABULARY` stands in.

    Raises:
        RecipeError: the sizes do not fit together, or not to the tokenizer.
    """
    pieces = tokenizer.vocab_size if tokenizer.source == "train" else model.vocab_size
    return llama_config(model, tokenizer_vocab_size=pieces or UNKNOWN_VOCABULARY, error=error)


def vocabulary_is_known(model: Model, tokenizer: Tokenizer) -> bool:
    """Whether the rows of embedding and head follow from the recipe alone."""
    return model.vocab_size is not None or tokenizer.source == "train"


def nearest_hyperparameters(facts: MethodFacts, config: LlamaConfig) -> tuple[str, Hyperparameters]:
    """The published values for the size that is nearest in parameters (by ratio), and the name of that size.

    Sizes are counted with the vocabulary of `config`, so that a model of a published size is nearest to itself.
    """
    sizes = [size for size in facts.hyperparameters if size != "*"]
    if not sizes:
        return "any size", facts.hyperparameters["*"]

    def distance(size: str) -> float:
        published = llama_config(Model(size=size, vocab_size=config.vocab_size), tokenizer_vocab_size=1)
        return abs(log(config.num_parameters / published.num_parameters))

    best = min(sizes, key=distance)
    return best, facts.hyperparameters[best]


def _class_of(name: str, line: Callable[[Problem], str]) -> type[Method]:
    if name not in method_names():
        raise RecipeError(line(Problem("method.name", "there is no such method", suggest_method(name))))
    return method_class(name)


def _draft_problems(draft: Draft) -> list[str]:
    """Lines for what is wrong with the method and the architecture of a recipe that may be wrong elsewhere too."""
    lines: list[str] = []
    model, tokenizer = draft.sections.get("model"), draft.sections.get("tokenizer")
    config = None
    if isinstance(model, Model) and isinstance(tokenizer, Tokenizer):

        def error_of(key: str, problem: str, *, fix: str = "") -> RecipeError:
            return RecipeError(draft.line(Problem(key, problem, fix)))

        try:
            config = assumed_config(with_initial_architecture(model, error_of), tokenizer, error=error_of)
        except RecipeError as error:
            lines.append(str(error))
    if isinstance(draft.method.get("name"), str):
        try:
            method = _class_of(draft.method["name"], draft.line)
        except RecipeError as error:
            return [*lines, str(error)]
        facts = method.facts
        published = nearest_hyperparameters(facts, config)[1] if config else next(iter(facts.hyperparameters.values()))
        _, problems = _options(method, draft.method, draft.layers.texts, published)
        lines += [draft.line(problem) for problem in problems]
    return lines


def _options(
    method: type[Method], table: Mapping[str, Any], texts: Mapping[str, str], published: Hyperparameters
) -> tuple[MethodOptions | None, list[Problem]]:
    """The typed options behind the `[method]` table, or what is wrong with it."""
    fields = method.Options.model_fields
    valid = ["name", *CommonKeys.model_fields, *fields]
    values = dict(published.options)
    problems: list[Problem] = []
    for key, value in table.items():
        if key == "layerwise" and key not in fields:
            problems.append(Problem("method.layerwise", f"{method.name} {_NOT_IN_BACKWARD}", "leave it out"))
        elif key not in valid:
            hint = did_you_mean(key, "method", valid)
            problems.append(Problem(f"method.{key}", f"{method.name} has no such option", hint))
        elif key in fields:
            text = texts.get(f"method.{key}")
            values[key] = value if text is None else parse_text(text, fields[key])
    common = {key: table[key] for key in CommonKeys.model_fields if key in table}
    problems += check_table("method", CommonKeys, common)[1]
    options, found = check_table("method", method.Options, values)
    return options, problems + found


def _filled_sections(
    loaded: LoadedRecipe, published: Hyperparameters, source: str
) -> tuple[dict[str, Section], dict[str, str]]:
    """The tables in which something is filled in, and a comment for every value that was not given."""
    recipe = loaded.recipe
    comments = {
        f"{table}.{key}": "default"
        for table, section in SECTIONS.items()
        for key in section.model_fields
        if f"{table}.{key}" not in loaded.origins and getattr(getattr(recipe, table), key) is not None
    }
    rates = {"learning_rate": published.learning_rate, "dense_rate": published.dense_rate, "clip": published.clip}
    absent = {key: rate for key, rate in rates.items() if getattr(recipe.schedule, key) is None and rate is not None}
    filled: dict[str, Section] = {"schedule": recipe.schedule.model_copy(update=absent)}
    comments.update({f"schedule.{key}": source for key in absent})
    if recipe.model.seed is None:
        filled["model"] = recipe.model.model_copy(update={"seed": derived_seed(recipe.run.seed, "model")})
        comments["model.seed"] = "derived from run.seed"
    if recipe.data.seed is None:
        filled["data"] = recipe.data.model_copy(update={"seed": derived_seed(recipe.run.seed, "data")})
        comments["data.seed"] = "derived from run.seed"
    return filled, comments
