"""`blockllm methods`: the training methods and what each says about itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockllm_cli.commands.options import JsonOption

if TYPE_CHECKING:
    from blockllm_cli.methods.base import Method


def methods(
    name: Annotated[str | None, typer.Argument(help="Method to describe; all are listed if left out.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the training methods, or describe one.

    Example: blockllm methods adamw
    """
    from blockllm_cli.methods.registry import method_class, method_names

    names = method_names() if name is None else [name]
    described = {known: _describe(method_class(known)) for known in names}
    if as_json:
        print(json.dumps(list(described.values()) if name is None else described[name], indent=2))
    elif name is None:
        print(_list(described))
    else:
        print(_page(name, described[name]))


def _describe(method: type[Method]) -> dict[str, Any]:
    """The facts and options of a method as plain JSON values."""
    from dataclasses import asdict

    from blockllm_cli.methods.resolve import CommonKeys
    from blockllm_cli.recipe.kinds import allowed

    fields = {**method.Options.model_fields, **CommonKeys.model_fields}
    facts = asdict(method.facts)
    return {
        "name": method.name,
        **facts,
        "hyperparameters": {size: dict(values) for size, values in facts["hyperparameters"].items()},
        "options": {
            key: {
                "allowed": allowed(field),
                "default": None if field.is_required() else field.get_default(call_default_factory=True),
                "required": field.is_required(),
                "description": field.description or "",
            }
            for key, field in fields.items()
        },
    }


def _list(described: dict[str, dict[str, Any]]) -> str:
    names = max(map(len, described))
    families = max(len(facts["family"]) for facts in described.values())
    rows = (f"{name:<{names}}  {facts['family']:<{families}}  {facts['summary']}" for name, facts in described.items())
    return "\n".join([*rows, "", "blockllm methods NAME describes one."])


def _page(name: str, facts: dict[str, Any]) -> str:
    lines = [f"{name}: {facts['title']}", facts["summary"], ""]
    lines += [f"paper     {facts['paper']}", f"family    {facts['family']}", f"keeps     {facts['keeps']}"]
    lines += [f"variants  {', '.join(facts['variants'])}"] if facts["variants"] else []
    lines += [f"limit     {limit}" for limit in facts["limits"]]
    lines += ["", "Options of [method]:"]
    lines += [_option(key, option) for key, option in facts["options"].items()]
    lines += ["", "Used where a recipe leaves them out, for the nearest model size:"]
    lines += [_published(size, values) for size, values in facts["hyperparameters"].items()]
    return "\n".join(lines)


def _option(key: str, option: dict[str, Any]) -> str:
    from blockllm_cli.recipe.kinds import literal

    default = option["default"]
    given = "required" if option["required"] else "absent" if default is None else literal(default)
    return f"  {key} = {given}  ({option['allowed']})\n      {option['description']}"


def _published(size: str, values: dict[str, Any]) -> str:
    dense = "as learning_rate" if values["dense_rate"] is None else f"{values['dense_rate']:g}"
    options = "".join(f", {key} {value}" for key, value in values["options"].items())
    where = "any size" if size == "*" else size
    rates = f"learning_rate {values['learning_rate']:g}, dense_rate {dense}, clip {values['clip']:g}{options}"
    return f"  {where:<8} {rates}  ({values['source']})"
