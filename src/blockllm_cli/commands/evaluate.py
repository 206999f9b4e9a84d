"""`blockllm evaluate`: perplexity of a run."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer

from blockllm_cli.commands.options import JsonOption, SetOption


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    step: Annotated[int | None, typer.Option(help="Which checkpoint, by its update; the newest if left out.")] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compute the perplexity of a run on its validation set, or on another one.

    Example: blockllm evaluate runs/quickstart/RUN --set evaluate.rows=8 --set data.validation=other/*.json.gz
    """
    from rich.console import Console

    from blockllm_cli.runner.finished import evaluate_run
    from blockllm_cli.tracking.terminal import Terminal

    # With --json, stdout carries the object alone.
    with Terminal(Console(stderr=True, highlight=False) if as_json else None) as terminal:
        opened, evaluation, digest = evaluate_run(run, step=step, overrides=set_ or [], terminal=terminal)
        if not as_json:
            terminal.table(
                f"{opened.folder.path}, update {opened.checkpoint.step}",
                [
                    ("perplexity", f"{evaluation.perplexity:.4f}"),
                    ("loss", f"{evaluation.loss:.6f}"),
                    ("sum of negative log likelihood", f"{evaluation.nll:.3f}"),
                    ("target tokens", f"{evaluation.targets:,}"),
                    ("as the literature computes it", f"{evaluation.perplexity_legacy:.4f}"),
                    ("validation rows (sha256)", digest),
                ],
            )
            return
    result: dict[str, Any] = {
        "run": str(opened.folder.path),
        "step": opened.checkpoint.step,
        "perplexity": evaluation.perplexity,
        "perplexity_legacy": evaluation.perplexity_legacy,
        "loss": evaluation.loss,
        "nll": evaluation.nll,
        "targets": evaluation.targets,
        "validation_sha256": digest,
    }
    # A figure that is not finite is null: JSON has no word for it.
    plain = {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in result.items()}
    print(json.dumps(plain, indent=2, allow_nan=False))
