"""Layers of a recipe (extended files, the file, `--method`, `--set`) and how a later one covers an earlier one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from blockllm_cli.errors import RecipeError
from blockllm_cli.recipe.files import RecipeFile, read_recipe_file, shown
from blockllm_cli.recipe.kinds import kind, parse_text, toml_value, unquoted
from blockllm_cli.recipe.names import TABLES, did_you_mean, which_table
from blockllm_cli.recipe.origins import Origin, Problem
from blockllm_cli.recipe.sections import SECTIONS

REPLACES: Mapping[str, str] = MappingProxyType({"steps": "tokens", "tokens": "steps"})
"""Keys of `[schedule]` that say the same in two ways: a layer that gives one takes the other away."""

GOVERNED: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "tokenizer.source": MappingProxyType(
            {"path": ("file", "hub"), "vocab_size": ("train",), "kind": ("train",), "sample_bytes": ("train",)}
        ),
        "data.corpus": MappingProxyType(
            {
                "train": ("files", "hub"),
                "validation": ("files", "hub"),
                "repository": ("hub",),
                "configuration": ("hub",),
                "revision": ("c4", "hub"),
                "shard_cache_bytes": ("c4", "hub"),
            }
        ),
        "schedule.shape": MappingProxyType({"min_ratio": ("cosine", "linear", "wsd", "papers")}),
    }
)
"""Keys that are read only for some values of another key of their table."""


@dataclass
class Layers:
    """The values of all layers so far, each with its origin, and what is wrong with the form of any.

    Attributes:
        values: table -> key -> value.
        origins: `table` and `table.key` -> where it stands.
        texts: `method.key` -> its text in a flag, whose type only the method knows.
        refused: what no table can check, each with the place where it stands.
    """

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    refused: list[tuple[Origin, Problem]] = field(default_factory=list)

    def add(self, layer: Layers) -> None:
        """Put `layer` over what is here."""
        for table, values in layer.values.items():
            mine = self.values.setdefault(table, {})
            for key in covered_keys(table, mine, values):
                self._forget(table, key)
            mine.update(values)
        self.origins.update(layer.origins)
        self.texts.update(layer.texts)
        self.refused.extend(layer.refused)

    def drop_table(self, table: str) -> None:
        """Take `[table]` away as a whole."""
        for key in list(self.values.get(table, {})):
            self._forget(table, key)
        self.origins.pop(table, None)

    def _forget(self, table: str, key: str) -> None:
        del self.values[table][key]
        self.origins.pop(f"{table}.{key}", None)
        self.texts.pop(f"{table}.{key}", None)

    def refuse(self, origin: Origin, problem: Problem) -> None:
        """Note that the form of this layer is wrong."""
        self.refused.append((origin, problem))


def covered_keys(table: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys of `[table]` that make no sense any more when the values `new` are put over the values `old`.

    They are the options of another method, the other way to give the same length, what belonged to another tokenizer
    or corpus, and rows of a pass that are more than the new rows of an update: then all of these are one pass.
    """
    if table == "method" and "name" in new and old.get("name") != new["name"]:
        return list(old)  # options belong to the method they were written for
    if table == "schedule":
        return [other for key, other in REPLACES.items() if key in new and other in old and other not in new]
    if table == "batch" and "micro_rows" not in new and _is_more(old.get("micro_rows"), new.get("rows")):
        return ["micro_rows"]
    covered = []
    for governor, keys in GOVERNED.items():
        owner, _, key = governor.partition(".")
        if owner == table and key in new:
            before = old.get(key, SECTIONS[table].model_fields[key].default)
            covered += [name for name in keys if before != new[key] and name in old]
    return covered


def _is_more(one: Any, other: Any) -> bool:
    """Whether both are numbers, and `one` the larger; nothing has been checked of values here."""
    return isinstance(one, int) and isinstance(other, int) and one > other


def file_chain(path: Path) -> list[RecipeFile]:
    """The recipe in `path`, the file that it extends, the file that that one extends, and so on.

    Raises:
        RecipeError: a file cannot be read or parsed, or files extend each other in a circle.
    """
    chain: list[RecipeFile] = []
    following: Path | None = path
    while following is not None:
        chain.append(read_recipe_file(following))
        following = _extended(chain)
    return chain


def layers_of(chain: Sequence[RecipeFile]) -> Layers:
    """The first file of `chain` over the second, over the third, and so on."""
    layers = Layers()
    for file in reversed(chain):
        layers.add(_file_layer(file))
    return layers


def _extended(chain: Sequence[RecipeFile]) -> Path | None:
    """The file that the last of `chain` extends."""
    file = chain[-1]
    if "extends" not in file.values:
        return None
    place = f"{file.name}:{file.lines[('extends',)]}"
    value = file.values["extends"]
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{place}: extends must be the path of a recipe as a string, not {kind(value)}")
    path = file.path.parent / value
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise RecipeError(f'{place}: extends = "{value}": {shown(path)} {what}; the path is relative to this file')
    if path.resolve() in [other.path.resolve() for other in chain]:
        circle = " -> ".join([*(other.name for other in chain), shown(path)])
        raise RecipeError(f'{place}: extends = "{value}": files extend each other in a circle: {circle}')
    return path


def _file_layer(file: RecipeFile) -> Layers:
    layer = Layers()
    for table, values in file.values.items():
        origin = Origin(file.name, file.lines.get((table,)))
        if table == "extends":
            continue
        if table not in TABLES:
            layer.refuse(origin, Problem(table, "is no table of a recipe", which_table(table)))
        elif not isinstance(values, dict):
            layer.refuse(origin, Problem(table, f"is {kind(values)} and must be a table", f"write [{table}]"))
        else:
            layer.values[table] = values
            layer.origins[table] = origin
            for key in values:
                layer.origins[f"{table}.{key}"] = Origin(file.name, file.lines.get((table, key)))
    return layer


def set_layer(overrides: Sequence[str]) -> Layers:
    """The layer of the `--set table.key=value` flags; of two for the same key the later one holds."""
    layer = Layers()
    for override in overrides:
        origin = Origin(f"--set {override}")
        left, equals, text = override.partition("=")
        table, dot, key = (part.strip() for part in left.partition("."))
        if not equals or not dot or not table or not key:
            layer.refuse(origin, Problem("--set", "takes table.key=value", "such as --set schedule.steps=100"))
        elif table not in TABLES:
            hint = which_table(table)
            layer.refuse(origin, Problem(table, "is no table of a recipe", hint))
        else:
            _set(layer, table, key, text, origin)
    return layer


def method_layer(argument: str) -> Layers:
    """The layer of `--method NAME[:key=value,...]`, which stands for the whole `[method]` table."""
    layer = Layers()
    origin = Origin(f"--method {argument}")
    name, colon, rest = argument.partition(":")
    if not name.strip():
        layer.refuse(origin, Problem("--method", "takes NAME or NAME:key=value,key=value"))
        return layer
    layer.origins["method"] = origin
    layer.values["method"] = {"name": unquoted(name.strip())}
    layer.origins["method.name"] = origin
    for part in _split_at_commas(rest) if colon else []:
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals or not key:
            layer.refuse(origin, Problem(f'"{part}"', "is no key=value", "such as --method adamw:weight_decay=0.1"))
        elif key in layer.values["method"]:
            layer.refuse(origin, Problem(f"method.{key}", "is given twice"))
        else:
            _set(layer, "method", key, text, origin)
    return layer


def _set(layer: Layers, table: str, key: str, text: str, origin: Origin) -> None:
    """Give `table.key` the value that `text` means; an unknown key is kept for the check of its table."""
    if table == "method":
        value = unquoted(text.strip()) if key == "name" else toml_value(text.strip())
        layer.texts[f"method.{key}"] = text
    else:
        fields = SECTIONS[table].model_fields
        if key not in fields:
            layer.refuse(origin, Problem(f"{table}.{key}", "is no key of a recipe", did_you_mean(key, table, fields)))
            return
        value = parse_text(text, fields[key])
    layer.values.setdefault(table, {})[key] = value
    layer.origins[f"{table}.{key}"] = origin


def _split_at_commas(text: str) -> list[str]:
    """Parts of `text` between commas that stand outside brackets and quotes."""
    parts = [""]
    depth, quote = 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts
