"""What a field of a table allows, in words, and how the text of a flag becomes its value."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

_WORDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", dict: "a table"}
_BOUNDS: Mapping[type, str] = MappingProxyType({Ge: "ge", Gt: "gt", Le: "le", Lt: "lt"})


def allowed(field: FieldInfo) -> str:
    """What may stand behind the key of `field`, such as `an integer of at least 1`."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"])
    words = " or ".join(dict.fromkeys(_words(option) for option in _options(field.annotation)))
    return f"{words} {_range(field.metadata)}".rstrip()


def literal(value: Any) -> str:
    """`value` as TOML writes it, for messages."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {literal(item)}" for key, item in value.items()) + "}"
    return str(value)


def kind(value: Any) -> str:
    """The kind of a TOML value, with its article."""
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (list, tuple)):
        return "a list"
    words = {str: "a string", int: "an integer", float: "a number with a fraction", dict: "a table"}
    return words.get(type(value), "a date or time")


def parse_text(text: str, field: FieldInfo) -> Any:
    """The value that `text` of a flag means for `field`.

    A string field takes the text literally, less one pair of quotes around it; a list of strings takes a TOML array or
    one string; everything else is read as a TOML value. Text that fits nothing is returned as the string it is, for
    the field's own check to refuse.
    """
    options = _options(field.annotation)
    text = text.strip()
    if any(_is_list(option) for option in options):
        value = toml_value(text)
        strings = any(_is_list(option) and _is_text(get_args(option)[0]) for option in options)
        return [unquoted(text)] if strings and not isinstance(value, list) else value
    if all(_is_text(option) for option in options):
        return unquoted(text)
    value = toml_value(text)
    if any(_is_text(option) for option in options) and not any(_takes(option, value) for option in options):
        return unquoted(text)
    return value


def toml_value(text: str) -> Any:
    """`text` read as a TOML value if it is one, else as it is."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 and "\n" not in text else text


def unquoted(text: str) -> str:
    """`text` without the pair of quotes around it, if there is one."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        value = toml_value(text)
        return value if isinstance(value, str) else text
    return text


def _range(metadata: Sequence[Any]) -> str:
    """The bounds among the metadata of a field in words, or as an interval where there are two."""
    bounds = {type(item): getattr(item, _BOUNDS[type(item)]) for item in metadata if type(item) in _BOUNDS}
    low = next((kind_of for kind_of in (Ge, Gt) if kind_of in bounds), None)
    high = next((kind_of for kind_of in (Le, Lt) if kind_of in bounds), None)
    if low and high:
        left, right = "[" if low is Ge else "(", "]" if high is Le else ")"
        return f"in {left}{_number(bounds[low])}, {_number(bounds[high])}{right}"
    words = {Ge: "of at least", Gt: "above", Le: "of at most", Lt: "below"}
    return " ".join(f"{words[only]} {_number(value)}" for only, value in bounds.items())


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)


def _options(annotation: Any) -> list[Any]:
    """The types that a union joins, without None and annotations."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return [option for part in get_args(annotation) for option in _options(part) if option is not NoneType]
    return [annotation]


def _is_list(option: Any) -> bool:
    return get_origin(option) in (list, tuple)


def _is_text(option: Any) -> bool:
    option = _options(option)[0]
    return option is str or get_origin(option) is Literal


def _takes(option: Any, value: Any) -> bool:
    if get_origin(option) is Literal:
        return value in get_args(option)
    return type(value) is option or (option is float and type(value) is int)


def _words(option: Any) -> str:
    if get_origin(option) is Literal:
        *first, last = [literal(value) for value in get_args(option)]
        return f"{', '.join(first)} or {last}" if first else last
    if not _is_list(option):
        return _WORDS.get(option, str(option))
    items = get_args(option)
    plural = _words(_options(items[0])[0]).split(" ", 1)[-1] + "s"
    count = f"{len(items)} " if get_origin(option) is tuple and Ellipsis not in items else ""
    metadata = [item for entry in getattr(items[0], "__metadata__", ()) for item in getattr(entry, "metadata", [entry])]
    bounds = _range(metadata)
    return f"a list of {count}{plural}" + (f", each {bounds}" if bounds else "")
