"""`blockllm recipes`: the recipes that come with the package."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import typer

from blockllm_cli.commands import completion
from blockllm_cli.commands.options import JsonOption
from blockllm_cli.commands.output import print_json
from blockllm_cli.errors import RecipeError, StorageError

app = typer.Typer(
    help="List, show and copy the recipes that come with blockllm.\n\nExample: blockllm recipes show c4/60m",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

NameArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Name of a recipe, such as c4/60m.", autocompletion=completion.recipes),
]


@app.command("list")
def list_recipes(as_json: JsonOption = False) -> None:
    """List the recipes that come with blockllm.

    Example: blockllm recipes list
    """
    from blockllm_cli.recipe.shipped import shipped_names, summary_of

    summaries = {name: summary_of(name) for name in shipped_names()}
    if as_json:
        print_json([{"name": name, "summary": summary} for name, summary in summaries.items()])
        return
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        print(f"{name:<{width}}  {summary}")


@app.command("show")
def show(
    name: NameArgument,
    resolved: Annotated[bool, typer.Option("--resolved", help="Fill in every value that it leaves out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print a recipe, with the files that it extends written into it.

    Example: blockllm recipes show c4/60m --resolved
    """
    from blockllm_cli.recipe.files import find_recipe
    from blockllm_cli.recipe.flatten import flattened

    path = find_recipe(name)
    text = _resolved(path) if resolved else flattened(path)
    if as_json:
        print_json({"name": name, "recipe": tomllib.loads(text)})
    else:
        print(text, end="")


def _resolved(path: Path) -> str:
    from blockllm_cli.methods.resolve import resolve_recipe
    from blockllm_cli.recipe.dump import dump_recipe

    result = resolve_recipe(path)
    return dump_recipe(result.recipe, result.comments)


@app.command("copy")
def copy(
    name: NameArgument,
    destination: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="File or folder; the current folder if left out.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
) -> None:
    """Copy a recipe to change it: one file that stands alone.

    Example: blockllm recipes copy c4/60m mine.toml
    """
    from blockllm_cli.recipe.files import find_recipe
    from blockllm_cli.recipe.flatten import flattened

    source = find_recipe(name)
    target = destination or Path()
    if target.is_dir():
        target /= f"{name.removesuffix('.toml').replace('/', '-')}.toml"
    try:
        with target.open("w" if force else "x", encoding="utf-8", newline="\n") as file:
            file.write(flattened(source))
    except FileExistsError as error:
        raise RecipeError(f"{target} exists; name another file, or overwrite it with --force") from error
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror or error}") from error
    print(target)
