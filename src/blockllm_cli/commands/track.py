"""`blockllm track`: send a run to Weights & Biases afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from blockllm_cli.commands.options import JsonOption, SetOption
from blockllm_cli.errors import InputError, RecipeError


def track(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    offline: Annotated[
        bool, typer.Option("--offline", help="Write files that `wandb sync` can send; no key, no network.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Give up after this long.")] = 600.0,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send rows, recipe, summary and selections of a run to Weights & Biases; what is there already stays.

    Example: blockllm track runs/quickstart/RUN --set tracking.project=thesis
    """
    from rich.console import Console

    from blockllm_cli.recipe.load import load_recipe
    from blockllm_cli.tracking.run_folder import RECIPE, RunFolder
    from blockllm_cli.tracking.terminal import Terminal
    from blockllm_cli.tracking.wandb_later import send_run

    _check_overrides(set_ or [])
    if not run.is_dir():
        raise InputError(f"{run} is not a folder; track takes the folder of a run")
    folder = RunFolder.existing(run)
    recipe = load_recipe(folder.path / RECIPE, overrides=set_ or []).recipe
    # With --json, stdout carries the object alone.
    with Terminal(Console(stderr=True, highlight=False) if as_json else None) as terminal:
        with terminal.working("writing" if offline else "sending"):
            done = send_run(
                folder, recipe.run.name, recipe.tracking, offline=offline, seconds=timeout, say=terminal.record
            )
        if not as_json:
            place = done["url"] or f"{done['files']} (send it with: wandb sync {done['files']})"
            terminal.say(f"{done['rows']} rows: {place}")
            return
    print(json.dumps({"run": str(folder.path), **done}, indent=2))


def _check_overrides(overrides: list[str]) -> None:
    for override in overrides:
        if not override.strip().startswith("tracking."):
            raise RecipeError(
                f"--set {override}: only tracking.* says where a run is shown; the rest is the run itself"
            )
