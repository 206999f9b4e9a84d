"""What a field allows, in words, for the forms of annotation that tables and method options use."""

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from blockllm_cli.recipe.kinds import allowed, kind, literal, parse_text

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Options(BaseModel):
    word: Literal["a", "b", "c"] = "a"
    one: Literal["a"] = "a"
    maybe: Literal["a", "b"] | None = None
    count: int | None = Field(None, ge=1)
    share: float = Field(0.5, gt=0, le=1)
    below: float = Field(0.5, lt=1.5)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    names: list[str] = []
    pieces: tuple[str, ...] = ()
    rows: int | Literal["auto"] = "auto"
    flag: bool = False
    either: int | float = 1
    worded: int = Field(1, json_schema_extra={"allowed": "an odd number"})


FIELDS = Options.model_fields


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("word", '"a", "b" or "c"'),
        ("one", '"a"'),
        ("maybe", '"a" or "b"'),
        ("count", "an integer of at least 1"),
        ("share", "a number in (0, 1]"),
        ("below", "a number below 1.5"),
        ("betas", "a list of 2 numbers, each in [0, 1)"),
        ("names", "a list of strings"),
        ("pieces", "a list of strings"),
        ("rows", 'an integer or "auto"'),
        ("flag", "true or false"),
        ("either", "an integer or a number"),
        ("worded", "an odd number"),
    ],
)
def test_says_what_a_field_allows(key: str, words: str) -> None:
    assert allowed(FIELDS[key]) == words


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("word", "a", "a"),
        ("word", "'a'", "a"),
        ("word", "1", "1"),
        ("count", " 12 ", 12),
        ("count", "auto", "auto"),
        ("count", "'12'", "12"),
        ("rows", "8", 8),
        ("rows", "auto", "auto"),
        ("rows", '"auto"', "auto"),
        ("rows", "8.5", "8.5"),
        ("share", "1e-3", 1e-3),
        ("flag", "true", True),
        ("flag", "yes", "yes"),
        ("betas", "[0.9, 0.95]", [0.9, 0.95]),
        ("betas", "0.9", 0.9),
        ("names", "a", ["a"]),
        ("names", '["a", "b"]', ["a", "b"]),
        ("pieces", "1", ["1"]),
        ("count", "1\ny = 2", "1\ny = 2"),
        ("count", "1 # x", 1),
        ("count", "[" * 5000, "[" * 5000),
        ("word", "'", "'"),
        ("word", "'a", "'a"),
    ],
)
def test_reads_the_text_of_a_flag(key: str, text: str, value: object) -> None:
    assert parse_text(text, FIELDS[key]) == value


def test_writes_values_and_their_kinds_as_toml_does() -> None:
    assert literal({"a": [1, True, "ü\n"], "b": 1e-8}) == '{a = [1, true, "ü\\n"], b = 1e-08}'
    assert [kind(value) for value in (True, 1, 1.0, "", [], {})] == [
        "a boolean",
        "an integer",
        "a number with a fraction",
        "a string",
        "a list",
        "a table",
    ]
