"""`blockllm pretrain`: train a Llama from a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from blockllm_cli.commands import completion
from blockllm_cli.commands.options import JsonOption, MethodOption, QuietOption, SetOption
from blockllm_cli.commands.output import open_terminal, print_json


def pretrain(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Recipe file, or the name of a shipped one (see `blockllm recipes list`).",
            autocompletion=completion.recipes,
        ),
    ] = None,
    method: MethodOption = None,
    set_: SetOption = None,
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder for runs; short for --set run.output=DIR.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the run; short for --set run.name=NAME.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="Go on with a run: `latest` (newest of this recipe's name), `latest-good` (an older checkpoint if "
            "the newest is damaged), or the folder of a run.",
            autocompletion=completion.places,
        ),
    ] = None,
    stop_after: Annotated[
        int | None, typer.Option(metavar="UPDATE", help="Save and stop after this update; resume goes on from there.")
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a Llama from a recipe; the last line printed is the run folder, with --json that and summary.json.

    Example: blockllm pretrain quickstart --set schedule.steps=100 --method adamw:weight_decay=0.1
    """
    from blockllm_cli.commands.closing import show_outcome
    from blockllm_cli.runner.pretrain import PretrainRequest, pretrain
    from blockllm_cli.tracking.run_folder import RunFolder

    overrides = list(set_ or [])
    overrides += [f"run.output={output}"] if output is not None else []
    overrides += [f"run.name={name}"] if name is not None else []
    request = PretrainRequest(recipe, overrides, method, resume, stop_after)
    with open_terminal(as_json=as_json, quiet=quiet) as terminal:
        folder = pretrain(request, terminal)
        show_outcome(folder, terminal)
    if as_json:
        print_json({"run": str(folder)} | (RunFolder(folder).summary() or {}))
    else:
        print(folder)
