"""A recipe as TOML text that loads back to the equal recipe, and its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import tomlkit
from tomlkit.items import Table

from blockllm_cli.recipe.layers import GOVERNED
from blockllm_cli.recipe.names import TABLES
from blockllm_cli.recipe.sections import Recipe


def dump_recipe(recipe: Recipe, comments: Mapping[str, str]) -> str:
    """`recipe` as TOML, every value written out; an absent value stays absent.

    Args:
        recipe: the values.
        comments: `table.key` -> text put behind the value, such as where it came from.
    """
    document = tomlkit.document()
    values = written_values(recipe)
    for name in TABLES:
        table: Table = tomlkit.table()
        for key, value in values[name].items():
            item = tomlkit.item(value)
            comment = comments.get(f"{name}.{key}")
            if comment:
                item.comment(_one_line(comment))
            table.add(key, item)
        document.add(name, table)
    return tomlkit.dumps(document)


def _one_line(comment: str) -> str:
    """`comment` as TOML allows it: one line without control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in comment).split())


def written_values(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Table -> key -> plain value of everything that `recipe` says: no absent value, and no key that nothing reads.

    Keys that only another tokenizer or corpus reads have their defaults, and a recipe that gave one would be refused.
    """
    values: dict[str, dict[str, Any]] = recipe.model_dump(mode="json", exclude_none=True)
    for governor, keys in GOVERNED.items():
        table, _, selector = governor.partition(".")
        for key, readers in keys.items():
            if values[table][selector] not in readers:
                values[table].pop(key, None)
    return values


def recipe_sha256(recipe: Recipe) -> str:
    """Hash of the values alone, as 64 hexadecimal digits: comments, order and layout of the text do not matter."""
    return hashlib.sha256(
        json.dumps(written_values(recipe), sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
