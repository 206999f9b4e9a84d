"""What a shell offers after TAB. Nothing here may import torch: a person waits for it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

Offers = list[tuple[str, str]]
"""Words, each with a line of help for the shells that show one."""


def recipes(incomplete: str) -> Offers:
    """Names of shipped recipes; where none begins so, the shell offers files."""
    from blockllm_cli.recipe.shipped import shipped_names, summary_of

    return [(name, summary_of(name)) for name in shipped_names() if name.startswith(incomplete)]


def methods(incomplete: str) -> list[str]:
    """Names of methods, built in or from other packages."""
    from blockllm_cli.errors import RecipeError
    from blockllm_cli.methods.registry import method_names

    try:
        names = method_names()
    except RecipeError:  # packages that clash: the command itself will say so, here it would spoil the prompt
        return []
    return [name for name in names if name.startswith(incomplete)]


def settings(incomplete: str) -> Offers:
    """For `--set`: tables, then the keys of one, then the values of a key that has a few words to choose from."""
    from blockllm_cli.recipe.sections import SECTIONS

    table, dot, rest = incomplete.partition(".")
    if not dot:
        return [(f"{name}.", f"keys of {name}") for name in (*SECTIONS, "method") if name.startswith(table)]
    key, equals, begun = rest.partition("=")
    if table == "method":
        # The other keys belong to the method, which only torch can import.
        if equals and key == "name":
            return [(f"method.name={name}", "") for name in methods(begun)]
        return [("method.name=", "the method")] if "name".startswith(key) and not equals else []
    if table not in SECTIONS:
        return []
    fields = SECTIONS[table].model_fields
    if not equals:
        return [(f"{table}.{name}=", _brief(fields[name].description)) for name in fields if name.startswith(key)]
    if key not in fields:
        return []
    return [(f"{table}.{key}={word}", "") for word in _words(fields[key].annotation) if word.startswith(begun)]


def places(incomplete: str) -> Offers:
    """For `--resume`: its two words and the runs under the default folder, newest first; else files are offered."""
    runs = sorted(Path("runs").glob("*/*/recipe.toml"), key=lambda path: path.parent.name, reverse=True)
    found = [
        ("latest", "the newest run of this recipe's name"),
        ("latest-good", "the same, from an older checkpoint if the newest is damaged"),
        *((str(path.parent), "") for path in runs),
    ]
    return [offer for offer in found if offer[0].startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    """Folders of runs under the default one, newest first; else the shell offers files."""
    return [place for place, _ in places(incomplete) if "/" in place]


def _brief(description: str | None) -> str:
    """What fits beside a word in one line."""
    return textwrap.shorten((description or "").partition(";")[0], 60, placeholder=" ...")


def _words(annotation: Any) -> Iterator[str]:
    """The values of a type of which there are only a few, as `--set` takes them."""
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    else:
        for part in get_args(annotation):
            yield from _words(part)
