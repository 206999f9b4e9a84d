"""Options that several commands share, worded once."""

from __future__ import annotations

from typing import Annotated

import typer

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="TABLE.KEY=VALUE", help="Override one value of the recipe; repeat for more. Later ones win."
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(metavar="NAME[:KEY=VALUE,...]", help="Replace the whole [method] table of the recipe."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
