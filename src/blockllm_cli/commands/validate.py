"""`blockllm validate`: what a recipe comes to, before anything is run."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockllm_cli.commands import completion
from blockllm_cli.commands.options import JsonOption, MethodOption, SetOption
from blockllm_cli.commands.output import print_json

if TYPE_CHECKING:
    from blockllm_cli.methods.resolve import Resolved


def validate(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Recipe file, or the name of one that `blockllm recipes list` lists.",
            autocompletion=completion.recipes,
        ),
    ],
    method: MethodOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a recipe, and print every value it leads to.

    Example: blockllm validate quickstart --method sgd --set schedule.steps=100
    """
    from blockllm_cli.methods.resolve import resolve_recipe

    report = _report(resolve_recipe(recipe, overrides=set_ or [], method=method))
    if as_json:
        print_json(report)
    else:
        print(_text(report))


def _report(resolved: Resolved) -> dict[str, Any]:
    """Everything that is printed, as plain JSON values."""
    from blockllm_cli.methods.resolve import assumed_config, vocabulary_is_known
    from blockllm_cli.recipe.dump import recipe_sha256, written_values
    from blockllm_cli.recipe.steps import slots_per_update, total_steps, warmup_steps

    recipe = resolved.recipe
    config = assumed_config(recipe.model, recipe.tokenizer, error=resolved.loaded.error)
    notes = []
    if not vocabulary_is_known(recipe.model, recipe.tokenizer):
        notes.append(
            f"the vocabulary is known when the tokenizer has been read; parameters are counted with {config.vocab_size}"
        )
    values = written_values(recipe)
    keys = [f"{table}.{key}" for table, section in values.items() for key in section]
    return {
        "recipe": values,
        "origins": {key: resolved.comments.get(key) or str(resolved.loaded.origins.get(key, "")) for key in keys},
        "recipe_sha256": recipe_sha256(recipe),
        "parameters": {"total": config.num_parameters, **_parameters_by_role(config.parameter_shapes())},
        "steps": total_steps(recipe),
        "warmup_steps": warmup_steps(recipe),
        "slots_per_update": slots_per_update(recipe),
        "slots": total_steps(recipe) * slots_per_update(recipe),
        "passes_per_update": recipe.batch.rows // (recipe.batch.micro_rows or recipe.batch.rows),
        "notes": notes,
    }


def _parameters_by_role(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    from blockllm_cli.model.roles import role_of

    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        role = role_of(name)
        counts[role] = counts.get(role, 0) + prod(shape)
    return counts


def _text(report: dict[str, Any]) -> str:
    from blockllm_cli.recipe.kinds import literal

    lines: list[str] = []
    for table, section in report["recipe"].items():
        lines += ["", f"[{table}]"] if lines else [f"[{table}]"]
        for key, value in section.items():
            lines.append(f"{key:<22} {literal(value):<24} {report['origins'][f'{table}.{key}']}".rstrip())
    roles = ", ".join(f"{role} {count:,}" for role, count in report["parameters"].items() if role != "total")
    lines += [
        "",
        f"parameters   {report['parameters']['total']:,} ({roles})",
        f"updates      {report['steps']:,}, of them {report['warmup_steps']:,} warm-up",
        f"an update    {report['slots_per_update']:,} slots in {report['passes_per_update']:,} pass(es)",
        f"the run      {report['slots']:,} slots (with packed rows nearly all are target tokens, with padding fewer)",
        f"sha256       {report['recipe_sha256']}",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])
