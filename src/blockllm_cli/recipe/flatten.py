"""A recipe that extends others as one text that stands alone, comments included."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import tomlkit
from tomlkit.items import Table
from tomlkit.toml_document import TOMLDocument

from blockllm_cli.recipe.layers import covered_keys, file_chain
from blockllm_cli.recipe.names import TABLES


def flattened(path: Path) -> str:
    """The text of the recipe in `path` with the files that it extends written into it.

    A recipe that extends nothing is returned as it is. Else every table has the keys of the extended file first, each
    where that file has it; a value that covers another brings its comment, or keeps that of the other if it has none.
    The comment at the top is that of `path`.

    Raises:
        RecipeError: a file cannot be read or parsed.
    """
    chain = file_chain(path)
    texts = [file.path.read_text(encoding="utf-8") for file in chain]
    if len(texts) == 1:
        return texts[0]
    *others, base = texts
    document = tomlkit.parse(_without_heading(base))
    for text in reversed(others):
        _cover(document, tomlkit.parse(text))
    in_order = tomlkit.document()
    for name in TABLES:
        if name in document:
            in_order.add(name, document[name])
    return _heading(texts[0]) + "\n" + tomlkit.dumps(in_order).strip("\n") + "\n"


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


def _without_heading(text: str) -> str:
    return text[len(_heading(text)) :]
