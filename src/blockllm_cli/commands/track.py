"""`blockllm track`: send a run to Weights & Biases afterwards."""

from __future__ import annotations

from typing import Annotated

import typer

from blockllm_cli.commands.options import JsonOption, QuietOption, RunArgument, SetOption
from blockllm_cli.commands.output import open_terminal, print_json
from blockllm_cli.errors import InputError, RecipeError


def track(
    run: RunArgument,
    offline: Annotated[
        bool, typer.Option("--offline", help="Write files that `wandb sync` can send; no key, no network.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Give up after this long.")] = 600.0,
    set_: SetOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send rows, recipe, summary and selections of a run to Weights & Biases; what is there already stays.

    Example: blockllm track runs/quickstart/RUN --set tracking.project=thesis
    """
    from blockllm_cli.recipe.load import load_recipe
    from blockllm_cli.tracking.run_folder import RECIPE, RunFolder
    from blockllm_cli.tracking.wandb_later import send_run

    _check_overrides(set_ or [])
    if not run.is_dir():
        raise InputError(f"{run} is not a folder; track takes the folder of a run")
    folder = RunFolder.existing(run)
    recipe = load_recipe(folder.path / RECIPE, overrides=set_ or []).recipe
    with (
        open_terminal(as_json=as_json, quiet=quiet) as terminal,
        terminal.progress("writing the run for W&B" if offline else "sending the run to W&B"),
    ):
        done = send_run(folder, recipe.run.name, recipe.tracking, offline=offline, seconds=timeout, say=terminal.record)
    if as_json:
        print_json({"run": str(folder.path), **done})
    else:
        place = done["url"] or f"{done['files']} (send it with: wandb sync {done['files']})"
        print(f"{done['rows']} rows: {place}")


def _check_overrides(overrides: list[str]) -> None:
    for override in overrides:
        if not override.strip().startswith("tracking."):
            raise RecipeError(
                f"--set {override}: only tracking.* says where a run is shown; the rest is the run itself"
            )
