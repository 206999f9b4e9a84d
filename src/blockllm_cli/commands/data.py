"""`blockllm data`: tokenise the data of a recipe ahead of its runs, and look at the rows it makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from blockllm_cli.commands import completion
from blockllm_cli.commands.options import JsonOption, QuietOption, SetOption
from blockllm_cli.commands.output import open_terminal, print_json
from blockllm_cli.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from blockllm_cli.runner.inspecting import BlockView, ShownRow, Stretch
    from blockllm_cli.runner.preparing import PrepareReport

app = typer.Typer(
    help="Tokenise the data of a recipe ahead of its runs, and look at the rows it makes of them.\n\n"
    "Example: blockllm data inspect quickstart --rows 2",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="Recipe file, or the name of one that `blockllm recipes list` lists.", autocompletion=completion.recipes
    ),
]

_BAD_SHOWN = 10


@app.command("prepare")
def prepare(
    recipe: RecipeArgument,
    set_: SetOption = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that tokenise; one per core if left out, 0: none beside this.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All shards, not only those the run will read.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read what is prepared already, compare hashes, make anew what is damaged.")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tokenise the shards that a run will read; the run then reads token ids in place of text.

    Rows, events and checkpoints are the same with and without. What is there is not made again; every run on the same
    text with the same tokenizer finds it, and needs no network for it.

    Example: blockllm data prepare c4/60m --set schedule.steps=1000 --workers 4
    """
    from blockllm_cli.runner.preparing import PrepareRequest, prepare_data

    request = PrepareRequest(recipe, set_ or [], workers, everything, check)
    with open_terminal(as_json=as_json, quiet=quiet) as terminal:
        report = prepare_data(request, terminal)
        if not as_json:
            terminal.table(f"prepared for {recipe}", _prepared(report))
            for line in _bad(report.bad):
                terminal.say(line)
    if as_json:
        print_json(report.as_json())
    elif quiet:
        print(f"{len(report.made)} shards made, {len(report.found)} found  ({report.folder})")


@app.command("inspect")
def inspect(
    recipe: RecipeArgument,
    set_: SetOption = None,
    rows: Annotated[int, typer.Option(min=0, help="How many rows are shown.")] = 4,
    epoch: Annotated[int, typer.Option(min=0, help="Pass over the data, from 0.")] = 0,
    block: Annotated[int, typer.Option(min=0, help="Block of that pass, from 0.")] = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show rows as text, with the borders of documents, and count what a block is made of.

    Example: blockllm data inspect quickstart --rows 2 --epoch 1 --block 3
    """
    from blockllm_cli.runner.inspecting import inspect_data

    with open_terminal(as_json=as_json, quiet=quiet) as terminal:
        view = inspect_data(recipe, overrides=set_ or [], epoch=epoch, block=block, rows=rows, terminal=terminal)
    if as_json:
        print_json(view.as_json())
        return
    print("\n".join(_page(view)))


def _page(view: BlockView) -> list[str]:
    lines = [line for row in view.shown for line in _row(row)]
    counts = _counts(view)
    width = max(len(name) for name, _ in counts)
    lines.append(f"block {view.block} of epoch {view.epoch}{', the last' if view.is_last else ''}")
    return [*lines, *(f"  {name:<{width}}  {value}" for name, value in counts), *_bad(view.bad)]


def _prepared(report: PrepareReport) -> list[tuple[str, str]]:
    share = "in one pass" if report.rows >= report.rows_wanted else "in one pass, which the run repeats"
    rows = [
        ("shards", f"{len(report.made)} made, {len(report.found)} found, of {report.shards}"),
        ("rows", f"{report.rows:,} {share}; the run reads {report.rows_wanted:,}"),
        ("documents", f"{report.documents:,} (and {report.empty:,} empty, {len(report.bad):,} bad)"),
        ("tokens", format_count(report.tokens)),
        ("text", f"{format_bytes(report.bytes)}{_per_token(report.bytes, report.tokens)}"),
        ("time", format_seconds(report.seconds)),
        ("where", report.folder),
    ]
    return [*rows, ("damaged", f"{len(report.damaged)}, made anew")] if report.damaged else rows


def _counts(view: BlockView) -> list[tuple[str, str]]:
    without = f" ({view.without_target:,} of them without a target)" if view.without_target else ""
    return [
        ("documents", f"{view.documents:,}{without}"),
        ("empty, bad", f"{view.empty:,}, {len(view.bad):,}"),
        ("rows", f"{view.rows:,} of {view.sequence_length} positions"),
        ("targets", f"{view.targets:,}"),
        ("fill of rows", f"{view.fill:.1%}".replace("%", " %")),
        ("tokens", f"{view.tokens:,}{_per_token(view.bytes, view.tokens)}"),
        ("unknown pieces", f"{view.unknown:,}"),
        ("surrogates replaced", f"{view.surrogates:,}"),
    ]


def _per_token(size: int, tokens: int) -> str:
    return f", {size / tokens:.2f} bytes a token" if tokens else ""


def _row(row: ShownRow) -> list[str]:
    lines = [f"row {row.number}: {row.targets} targets", *(f"  {_stretch(each)}" for each in row.stretches)]
    return [*lines, *([f"  <padding of {row.padding}>"] if row.padding else [])]


def _stretch(stretch: Stretch) -> str:
    text = stretch.text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    begin, end = "<bos>" if stretch.begins else "", "<eos>" if stretch.ends else "..."
    return f"{stretch.document} ({stretch.pieces} pieces)  {begin}{text}{end}"


def _bad(bad: list[dict[str, str | int]]) -> list[str]:
    lines = [f"bad document: {each['file']}, line {each['line']}: {each['reason']}" for each in bad[:_BAD_SHOWN]]
    return [*lines, *([f"and {len(bad) - _BAD_SHOWN:,} more (--json has all)"] if len(bad) > _BAD_SHOWN else [])]
