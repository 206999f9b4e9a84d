"""`blockllm export`: a run's model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from blockllm_cli.commands.options import JsonOption, QuietOption, RunArgument, StepOption
from blockllm_cli.commands.output import open_terminal, print_json

if TYPE_CHECKING:
    from blockllm_cli.runner.export import Exported


def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to make; it must not exist, or be empty.")],
    step: StepOption = None,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(help="Type of the stored weights, fp32 or bf16; that of the run's weights if left out."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that was exported there.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a run's model as a folder that Hugging Face transformers loads, tokenizer and model card included.

    Example: blockllm export runs/quickstart/RUN --to models/quickstart
    """
    from blockllm_cli.runner.export import ExportRequest, export_run

    with open_terminal(as_json=as_json, quiet=quiet) as terminal:
        exported = export_run(ExportRequest(run, to, step, dtype, overwrite), terminal)
        terminal.table(f"{exported.run}, update {exported.step}", _rows(exported))
        for note in _notes(exported):
            terminal.say(f"note: {note}")
    if as_json:
        print_json(exported.to_json())
    else:
        print(exported.folder)


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
