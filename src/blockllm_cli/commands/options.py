"""Arguments and options that several commands share, worded once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockllm_cli.commands import completion

RunArgument = Annotated[Path, typer.Argument(help="Folder of a run.", autocompletion=completion.runs)]
StepOption = Annotated[
    int | None, typer.Option(metavar="UPDATE", help="Which checkpoint, by its update; the newest if left out.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Override one value of the recipe; repeat for more. Later ones win.",
        autocompletion=completion.settings,
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:KEY=VALUE,...]",
        help="Replace the whole [method] table of the recipe.",
        autocompletion=completion.methods,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, alone on stdout; all else goes to stderr.")
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print warnings, errors and the last line or result only.")
]
