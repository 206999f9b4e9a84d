"""`blockllm evaluate`: perplexity of a run."""

from __future__ import annotations

from blockllm_cli.commands.options import JsonOption, QuietOption, RunArgument, SetOption, StepOption
from blockllm_cli.commands.output import open_terminal, print_json


def evaluate(
    run: RunArgument,
    step: StepOption = None,
    set_: SetOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compute the perplexity of a run on its validation set, or on another one.

    Example: blockllm evaluate runs/quickstart/RUN --set evaluate.rows=8 --set data.validation=other/*.json.gz
    """
    from blockllm_cli.runner.finished import evaluate_run

    with open_terminal(as_json=as_json, quiet=quiet) as terminal:
        opened, evaluation, digest = evaluate_run(run, step=step, overrides=set_ or [], terminal=terminal)
        where = f"{opened.folder.path}, update {opened.checkpoint.step}"
        if not as_json:
            terminal.table(
                where,
                [
                    ("perplexity", f"{evaluation.perplexity:.4f}"),
                    ("loss", f"{evaluation.loss:.6f}"),
                    ("sum of negative log likelihood", f"{evaluation.nll:.3f}"),
                    ("target tokens", f"{evaluation.targets:,}"),
                    ("as the literature computes it", f"{evaluation.perplexity_legacy:.4f}"),
                    ("validation rows (sha256)", digest),
                ],
            )
    if as_json:
        print_json(
            {
                "run": str(opened.folder.path),
                "step": opened.checkpoint.step,
                "perplexity": evaluation.perplexity,
                "perplexity_legacy": evaluation.perplexity_legacy,
                "loss": evaluation.loss,
                "nll": evaluation.nll,
                "targets": evaluation.targets,
                "validation_sha256": digest,
            }
        )
    elif quiet:
        print(f"perplexity {evaluation.perplexity:.4f}  ({where}, {evaluation.targets:,} target tokens)")
