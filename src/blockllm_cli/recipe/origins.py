"""Where a value of a recipe comes from, and the one form in which an error about it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from blockllm_cli.recipe.kinds import literal

ABSENT: Any = object()
"""Stands for the value of a key that no file and no flag gives."""


@dataclass(frozen=True)
class Origin:
    """A file and the line in it (from 1), or a flag as it was typed."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


class Problem(NamedTuple):
    """What is wrong with one key (dotted), and the way out."""

    key: str
    text: str
    fix: str = ""


def origin_of(key: str, origins: Mapping[str, Origin], default: Origin) -> Origin:
    """Where `key` stands; for an absent key where its table begins, else `default`."""
    return origins.get(key) or origins.get(key.partition(".")[0]) or default


def joined(lines: Sequence[str]) -> str:
    """The text of one error that names several problems, one a line."""
    return lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems:", *lines])


def describe(problem: Problem, origin: Origin, value: Any = ABSENT) -> str:
    """The line that a user reads: place, key, value, what is wrong, the way out.

    A problem such as "is 3, which is odd" names the value itself.
    """
    key, text, fix = problem
    named = value is ABSENT or (text.startswith("is ") and str(value) in text)
    subject = key if named else f"{key} = {literal(value)}:"
    return f"{origin}: {subject} {text}" + (f"; {fix}" if fix else "")
