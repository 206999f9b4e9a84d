"""`blockllm methods`: the training methods, what each says about itself, and whether it keeps the contract."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from blockllm_cli.commands import completion
from blockllm_cli.commands.options import JsonOption, QuietOption
from blockllm_cli.commands.output import print_json
from blockllm_cli.errors import GuardError, RecipeError

if TYPE_CHECKING:
    from blockllm_cli.methods.base import Method
    from blockllm_cli.testing import Result

SHOW = "show"


class _ShowGroup(TyperGroup):
    """A group whose command `show` need not be named: `methods`, `methods NAME`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `show` before arguments that name no command, except where a shell asks what could come first."""
        named = args[0] in (*self.commands, *ctx.help_option_names) if args else ctx.resilient_parsing
        return super().parse_args(ctx, list(args) if named else [SHOW, *args])

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """The commands, and the names that `show` takes."""
        offers = super().shell_complete(ctx, incomplete)
        return offers + self.commands[SHOW].params[0].shell_complete(ctx, incomplete)


app = typer.Typer(
    cls=_ShowGroup,
    help="List the training methods, describe one, or check one.\n\nExample: blockllm methods adamw",
    add_completion=False,
    rich_markup_mode="markdown",
)


@app.command(SHOW)
def show(
    name: Annotated[
        str | None,
        typer.Argument(help="Method to describe; all are listed if left out.", autocompletion=completion.methods),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the training methods, or describe one; the word `show` can be left out.

    Example: blockllm methods adamw
    """
    from blockllm_cli.methods.registry import method_class, method_names

    names = method_names() if name is None else [name]
    described = {known: _describe(method_class(known)) for known in names}
    if as_json:
        print_json(list(described.values()) if name is None else described[name])
    elif name is None:
        print(_list(described))
    else:
        print(_page(name, described[name]))


@app.command("check")
def check(
    name: Annotated[
        str, typer.Argument(help="Method to check, of this package or of another.", autocompletion=completion.methods)
    ],
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="Set one option of the method; repeat for more."),
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check on a tiny model that a method keeps the contract: under a minute, no data, no network.

    Ends with 7 if it does not. `docs/plugins.md` says what the contract is.

    Example: blockllm methods check adamw --option weight_decay=0.1
    """
    import torch

    from blockllm_cli.methods.registry import method_class
    from blockllm_cli.testing import run_suite

    method = method_class(name)
    options = _parsed(method, option or [])
    torch.set_num_threads(1)  # the tensors are so small that a second thread only costs time
    narrated = sys.stderr if as_json else sys.stdout

    def tell(result: Result) -> None:
        if not quiet or result.status == "failed":
            _print_result(result, narrated)

    results = run_suite(method, options, tell)
    if as_json:
        print_json([vars(result) for result in results])
    failed = [result for result in results if result.status == "failed"]
    if failed:
        raise GuardError(f"method {name} does not keep {len(failed)} of {len(results)} promises of the contract")
    if not as_json:
        print(f"method {name} keeps the contract: {sum(result.status == 'passed' for result in results)} checks passed")


def _parsed(method: type[Method], texts: Sequence[str]) -> dict[str, Any]:
    """The options that `--option` gives, each as the value of its field."""
    from blockllm_cli.recipe.kinds import parse_text
    from blockllm_cli.recipe.names import did_you_mean

    fields = method.Options.model_fields
    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            raise RecipeError(f"--option {text}: write key=value")
        if key not in fields:
            raise RecipeError(
                f"--option {text}: {method.name} has no such option; {did_you_mean(key, 'method', fields)}"
            )
        values[key] = parse_text(value, fields[key])
    return values


def _print_result(result: Result, stream: TextIO) -> None:
    words = {"passed": "ok", "failed": "FAILED", "not applicable": "-"}
    print(f"{words[result.status]:<7} {result.title}  ({result.seconds:.1f} s)", file=stream, flush=True)
    if result.message:
        print(f"        {result.message}", file=stream, flush=True)


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
