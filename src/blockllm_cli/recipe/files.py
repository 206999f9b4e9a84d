"""From the path that a user typed to the parsed TOML text of a recipe, with the line of every key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockllm_cli.errors import RecipeError
from blockllm_cli.recipe.lines import Key, key_lines
from blockllm_cli.recipe.names import nearest
from blockllm_cli.recipe.shipped import shipped_names, shipped_path

_POSITION = re.compile(
    r"^(?P<problem>.*?) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$", re.S
)


@dataclass(frozen=True)
class RecipeFile:
    """One TOML file: its text, its values, the line of every key."""

    path: Path
    text: str
    values: Mapping[str, Any]
    lines: Mapping[Key, int]

    @property
    def name(self) -> str:
        """The path as messages show it."""
        return shown(self.path)


def shown(path: Path) -> str:
    """`path` for messages: relative where it lies under the current folder."""
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def find_recipe(argument: str | Path) -> Path:
    """The file behind a RECIPE argument: a path, or the name of a shipped recipe such as `c4/60m`.

    Raises:
        RecipeError: neither exists; the message names what comes nearest.
    """
    path = Path(argument)
    try:
        if path.exists() and not path.is_dir():  # also a pipe, as a shell makes it of <(...)
            return path
        # A folder that happens to have the name of a shipped recipe, such as that of its runs, does not hide it.
        shipped = shipped_path(str(argument))
        if shipped is not None:
            return shipped
        if path.is_dir():
            raise RecipeError(f"{argument} is a folder, not a recipe{_inside(path)}")
        raise RecipeError(f"there is no recipe {argument}{_instead(path)}")
    except OSError as error:
        raise RecipeError(f"{argument}: cannot be read: {error.strerror or error}") from error


def read_recipe_file(path: Path) -> RecipeFile:
    """Read and parse one file.

    Raises:
        RecipeError: it cannot be read, is not UTF-8 or not TOML; the message has the line.
    """
    name = shown(path)
    try:
        text = _decode(path.read_bytes(), name)
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read: {error.strerror or error}") from error
    try:
        values = tomllib.loads(text)
    except RecursionError as error:
        raise RecipeError(f"{name}: not a recipe: values are nested too deeply") from error
    except ValueError as error:
        raise RecipeError(_syntax_error(name, text, str(error))) from error
    return RecipeFile(path, text, values, key_lines(text))


def _decode(content: bytes, name: str) -> str:
    for mark, encoding in ((b"\xef\xbb\xbf", "UTF-8"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")):
        if content.startswith(mark):
            raise RecipeError(f"{name}:1: begins with a {encoding} byte order mark; save it as UTF-8 without one")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise RecipeError(f"{name}:{line}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from error


def _syntax_error(name: str, text: str, message: str) -> str:
    match = _POSITION.match(message)
    if match is None:
        return f"{name}: not valid TOML: {message}"
    problem = match["problem"]
    if match["line"] is None:
        last = len(text.rstrip("\n").split("\n"))
        return f"{name}:{last}: not valid TOML: {problem} (the file ends in the middle of something)"
    line = int(match["line"])
    source = text.replace("\r\n", "\n").split("\n")[line - 1].strip()
    hint = ""
    if "=" in source and re.search(r"=\s*[A-Za-z][\w./*-]*\s*(#.*)?$", source):
        hint = "; text needs quotes, and booleans are true and false"
    return f"{name}:{line}: not valid TOML: {problem} (column {match['column']}) in: {source}{hint}"


def _instead(path: Path) -> str:
    """What the user may have meant by a path that does not exist."""
    names = shipped_names()
    folder = path.parent
    files = {str(file): file for file in folder.glob("*.toml")} if folder.is_dir() else {}
    near = nearest(str(path), [*files, *names]) or nearest(str(path.with_suffix("")), names)
    return f"; did you mean {near}?" if near else f"; shipped recipes: {', '.join(names)}"


def _inside(folder: Path) -> str:
    files = sorted(folder.glob("*.toml"))
    return f"; it holds {', '.join(str(file) for file in files[:5])}" if files else ""
