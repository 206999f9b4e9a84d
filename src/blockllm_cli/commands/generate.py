"""`blockllm generate`: text from a run's model."""

from __future__ import annotations

from typing import Annotated

import typer

from blockllm_cli.commands.options import JsonOption, RunArgument, StepOption
from blockllm_cli.commands.output import print_json


def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue.")] = "",
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most tokens to add; the end of a document ends earlier.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token each time.")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, metavar="K", help="Draw among the k likeliest only.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Seed of the draws.")] = 0,
    step: StepOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt with the model of a run.

    Example: blockllm generate runs/quickstart/RUN --prompt "The function returns" --temperature 0
    """
    from blockllm_cli.runner.finished import generate_text, opened_run

    with opened_run(run, step=step) as opened:
        text = generate_text(opened, prompt, max_new_tokens=tokens, temperature=temperature, top_k=top_k, seed=seed)
    if as_json:
        print_json({"run": str(run), "step": opened.checkpoint.step, "text": text})
    else:
        print(text)
