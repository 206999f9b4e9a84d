"""A recipe that extends others as one text that stands alone, comments included."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.items import Table
from tomlkit.toml_document import TOMLDocument

from blockllm_cli.recipe.layers import covered_keys, file_chain, layers_of
from blockllm_cli.recipe.names import TABLES


def flattened(path: Path) -> str:
    """The text of the recipe in `path` with the files that it extends written into it.

    A recipe that extends nothing is returned as it is. Else every table has the keys of the extended file first, each
    where that file has it; a value that covers another brings its comment, or keeps that of the other if it has none.
    The comment at the top is that of `path`. Files that write tables in another way than under a header lose their
    comments.

    Raises:
        RecipeError: a file cannot be read or parsed.
    """
    chain = file_chain(path)
    texts = [file.text for file in chain]
    if len(texts) == 1:
        return texts[0]
    values = layers_of(chain).values
    flat = tomlkit.dumps(_joined(texts)).strip("\n")
    if not _says(flat, values):
        flat = tomlkit.dumps(values).strip("\n")
    return f"{_heading(texts[0])}\n{flat}\n"


def _says(text: str, values: Mapping[str, Any]) -> bool:
    try:
        return tomllib.loads(text) == values
    except tomllib.TOMLDecodeError:
        return False


def _joined(texts: Sequence[str]) -> TOMLDocument:
    """The first of `texts` over the second, over the third, and so on, tables in the usual order."""
    *others, base = texts
    document = tomlkit.parse(base[len(_heading(base)) :])
    for text in reversed(others):
        _cover(document, tomlkit.parse(text))
    in_order = tomlkit.document()
    for name in TABLES:
        if name in document:
            in_order.add(name, document[name])
    return in_order


def _cover(document: TOMLDocument, other: TOMLDocument) -> None:
    """Put the values of `other` over those of `document`, table by table."""
    for name, table in other.items():
        if not isinstance(table, Table):
            continue
        if name not in document:
            document.add(name, table)
            continue
        mine = document[name]
        for covered in covered_keys(name, mine.unwrap(), table.unwrap()):
            del mine[covered]
        for key, item in table.value.body:  # not items(), which gives a boolean without its comment
            if key is not None:
                mine[key] = item


def _heading(text: str) -> str:
    """The comment lines at the top of a recipe, each with its end of line."""
    lines = text.splitlines(keepends=True)
    return "".join(takewhile(lambda line: line.startswith("#"), lines))
