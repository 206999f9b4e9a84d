"""`blockllm export`: a run's model for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from blockllm_cli.commands.options import JsonOption

if TYPE_CHECKING:
    from blockllm_cli.runner.export import Exported


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    to: Annotated[Path, typer.Option(help="Folder to make; it must not exist, or be empty.")],
    step: Annotated[int | None, typer.Option(help="Which checkpoint, by its update; the newest if left out.")] = None,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(help="Type of the stored weights; that of the run's weights if left out."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that was exported there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a run's model as a folder that Hugging Face transformers loads, tokenizer and model card included.

    Example: blockllm export runs/quickstart/RUN --to models/quickstart
    """
    from rich.console import Console

    from blockllm_cli.runner.export import ExportRequest, export_run
    from blockllm_cli.tracking.terminal import Terminal

    # With --json, stdout carries the object alone.
    with Terminal(Console(stderr=True, highlight=False) if as_json else None) as terminal:
        exported = export_run(ExportRequest(run, to, step, dtype, overwrite), terminal)
        if not as_json:
            terminal.table(f"{exported.run}, update {exported.step}", _rows(exported))
            for note in _notes(exported):
                terminal.say(f"note: {note}")
            terminal.say(str(exported.folder))
            return
    print(json.dumps(exported.to_json(), indent=2, allow_nan=False))


def _rows(exported: Exported) -> list[tuple[str, str]]:
    from blockllm_cli.units import format_bytes, format_count

    found = exported.comparison
    rows = [
        ("parameters", f"{format_count(exported.parameters)} in {exported.dtype}"),
        ("files", f"{len(exported.files)}, {format_bytes(sum(exported.files.values()))}"),
        ("stored weights", "read back, equal to the run's to the bit"),
        ("largest logit of the probe", f"{found.largest_logit:.4g} ({found.probe_tokens} tokens)"),
        ("difference by the stored type", f"{found.stored_difference:.2e}"),
    ]
    if found.transformers is not None:
        rows.append((f"difference to transformers {found.transformers}", f"{found.transformers_difference:.2e}"))
    if found.tokenizers is not None:
        rows.append(
            (f"texts that tokenizers {found.tokenizers} reads otherwise", f"{found.texts_different} of {found.texts}")
        )
    return rows


def _notes(exported: Exported) -> list[str]:
    found, notes = exported.comparison, []
    if found.transformers is None:
        notes.append("transformers is not installed, so its logits were not compared (pip install 'blockllm-cli[hf]')")
    if exported.tokenizer_problem is not None:
        notes.append(f"there is no tokenizer.json: {exported.tokenizer_problem}; tokenizer.model is there")
    if found.texts_different:
        notes.append(
            "ids differ where two segmentations are equally likely, or a text holds the name of a special piece: use "
            "tokenizer.model where that matters"
        )
    return notes
