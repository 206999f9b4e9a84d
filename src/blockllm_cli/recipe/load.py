"""Load a recipe: file over the files it extends, then `--method`, then `--set`; everything checked, all at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from blockllm_cli.errors import RecipeError
from blockllm_cli.recipe.checks import cross_checks
from blockllm_cli.recipe.files import find_recipe, shown
from blockllm_cli.recipe.kinds import allowed, kind, parse_text
from blockllm_cli.recipe.layers import Layers, file_chain, layers_of, method_layer, set_layer
from blockllm_cli.recipe.names import did_you_mean
from blockllm_cli.recipe.origins import ABSENT, Origin, Problem, describe, joined, origin_of
from blockllm_cli.recipe.sections import SECTIONS, Recipe, Section

Table = TypeVar("Table", bound=BaseModel)


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and where each of its given values stands.

    Attributes:
        recipe: the values, defaults included; the `[method]` table as it was given.
        origins: `table` and `table.key` -> file and line, or flag; keys left at their default are absent.
        path: the file that was loaded.
        texts: `method.key` -> its text in a flag: only the method knows the type that it is meant to have.
    """

    recipe: Recipe
    origins: Mapping[str, Origin]
    path: Path
    texts: Mapping[str, str] = field(default_factory=dict)

    def error(self, key: str, problem: str, *, fix: str = "") -> RecipeError:
        """The error for the dotted `key`: file, line, key, value, `problem`, and `fix` if there is one.

        A `problem` such as "is 3, which is odd" names the value itself; else it is put before.
        """
        return RecipeError(self.line(Problem(key, problem, fix)))

    def line(self, problem: Problem) -> str:
        """One line of a message: where the key of `problem` stands, its value, and what is wrong with it."""
        table, _, name = problem.key.partition(".")
        section = getattr(self.recipe, table, None)
        value = section.get(name) if isinstance(section, dict) else getattr(section, name, None)
        origin = origin_of(problem.key, self.origins, Origin(shown(self.path)))
        return describe(problem, origin, ABSENT if value is None else value)


@dataclass(frozen=True)
class Draft:
    """A recipe that was read and may be wrong: what is valid of it, and a line for everything that is not."""

    path: Path
    layers: Layers
    sections: Mapping[str, Section]
    problems: Sequence[str]

    @property
    def method(self) -> Mapping[str, Any]:
        """The `[method]` table as it was given."""
        return self.layers.values.get("method", {})

    def line(self, problem: Problem) -> str:
        """One line of a message, as `LoadedRecipe.line` writes it."""
        return describe(problem, _place(problem, self.layers, self.path), _value(problem, self.layers))

    def finish(self) -> LoadedRecipe:
        """The loaded recipe.

        Raises:
            RecipeError: there are problems; one line for each.
        """
        if self.problems:
            raise RecipeError(joined(self.problems))
        recipe = Recipe.model_validate({**self.sections, "method": dict(self.method)})
        return LoadedRecipe(recipe, self.layers.origins, self.path, self.layers.texts)


def load_recipe(path: str | Path, *, overrides: Sequence[str] = (), method: str | None = None) -> LoadedRecipe:
    """Load and check a recipe; the keys of its `[method]` table are checked by `methods.resolve`.

    Args:
        path: a file, or the name of a shipped recipe.
        overrides: texts of `--set table.key=value`.
        method: text of `--method NAME[:key=value,...]`, which replaces the whole `[method]` table.

    Raises:
        RecipeError: with one line per problem.
    """
    return read_draft(path, overrides=overrides, method=method).finish()


def read_draft(path: str | Path, *, overrides: Sequence[str] = (), method: str | None = None) -> Draft:
    """Read a recipe and collect what is wrong with it. Arguments as those of `load_recipe`.

    Raises:
        RecipeError: no recipe could be read at all: no file, not TOML, files that extend each other.
    """
    found = find_recipe(path)
    layers = layers_of(file_chain(found))
    if method is not None:
        layers.drop_table("method")
        layers.add(method_layer(method))
    layers.add(set_layer(overrides))
    sections: dict[str, Section] = {}
    problems: list[Problem] = []
    for table, section in SECTIONS.items():
        checked, found_problems = check_table(table, section, layers.values.get(table, {}))
        problems += found_problems
        if checked is not None:
            sections[table] = checked
    problems += cross_checks(sections, layers.origins)
    problems += _method_name(layers.values.get("method", {}))
    placed = [(_place(problem, layers, found), problem) for problem in problems]
    lines = [(place, describe(problem, place)) for place, problem in layers.refused]
    lines += [(place, describe(problem, place, _value(problem, layers))) for place, problem in placed]
    lines.sort(key=lambda line: _reading_order(line[0], found))
    return Draft(found, layers, sections, [line for _, line in lines])


def _place(problem: Problem, layers: Layers, path: Path) -> Origin:
    return origin_of(problem.key, layers.origins, Origin(shown(path)))


def _value(problem: Problem, layers: Layers) -> Any:
    table, _, name = problem.key.partition(".")
    return layers.values.get(table, {}).get(name, ABSENT)


def _reading_order(place: Origin, path: Path) -> tuple[bool, bool, str, int]:
    """The recipe from top to bottom, then the files it extends, then the flags."""
    is_flag = place.source.startswith("--")
    return is_flag, place.source != shown(path), "" if is_flag else place.source, place.line or 0


def _method_name(method: Mapping[str, Any]) -> Iterator[Problem]:
    name = method.get("name")
    if name is None:
        yield Problem("method.name", "is missing", "name a method such as adamw; `blockllm methods` lists them")
    elif not isinstance(name, str):
        yield Problem("method.name", f"must be the name of a method as a string, not {kind(name)}")


def check_table(table: str, model: type[Table], values: Mapping[str, Any]) -> tuple[Table | None, list[Problem]]:
    """`values` as an instance of `model`, or None and what is wrong with them.

    Values pass through JSON, where strictness keeps 1, 1.0, "1" and true apart and yet lists become tuples.
    """
    try:
        return model.model_validate_json(json.dumps(values, default=_date), strict=True), []
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    kinds: dict[str, list[str]] = {}
    messages: dict[str, str] = {}
    for detail in details:
        key = str(detail["loc"][0]) if detail["loc"] else ""
        kinds.setdefault(key, []).append(detail["type"])
        messages[key] = detail["msg"]
    return None, [_problem(table, model, key, values, types, messages[key]) for key, types in kinds.items()]


def _date(value: Any) -> dict[str, str]:
    """A date of TOML in a form that no field takes: as text it would pass for a string."""
    return {"date or time": str(value)}


def _problem(
    table: str, model: type[BaseModel], key: str, values: Mapping[str, Any], types: Sequence[str], message: str
) -> Problem:
    if not key:
        return Problem(table, message.removeprefix("Value error, "))
    path = f"{table}.{key}"
    field = model.model_fields.get(key)
    if field is None:
        return Problem(path, "there is no such key", did_you_mean(key, table, model.model_fields))
    description = f"({field.description.rstrip('.')})" if field.description else ""
    if key not in values:
        return Problem(path, f"is missing; give {allowed(field)} {description}".rstrip())
    if types == ["value_error"]:
        return Problem(path, f"{message.removeprefix('Value error, ')} {description}".rstrip())
    value = values[key]
    text = f"must be {allowed(field)}"
    if all(kind_of.endswith("_type") for kind_of in types):
        text += f", not {kind(value)}"
    return Problem(path, f"{text} {description}".rstrip(), _rewrite(value, field))


def _rewrite(value: Any, field: FieldInfo) -> str:
    """How the value should have been written, where that can be told."""
    if isinstance(value, float) and value.is_integer() and "integer" in allowed(field):
        return f"write {int(value)}"
    if isinstance(value, str):
        meant = parse_text(value, field)
        return f"write {value} without quotes" if type(meant) in (int, float, bool) else ""
    return ""
