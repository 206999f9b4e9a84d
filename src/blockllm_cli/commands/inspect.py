"""`blockllm inspect`: which block of a run was trained when, and why it was chosen."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockllm_cli.commands.options import JsonOption, RunArgument
from blockllm_cli.commands.output import print_json
from blockllm_cli.errors import InputError
from blockllm_cli.units import format_count

if TYPE_CHECKING:
    from rich.text import Text

    from blockllm_cli.tracking.run_folder import RunFolder
    from blockllm_cli.tracking.selections import BlockHistory, Selection, SelectionTable, Span

WIDTH = 80
LABEL_WIDTH = 22
LISTED = 20
# From never trained to trained in every update of the bin; the other row is for terminals without such characters.
SHADES, PLAIN_SHADES = "·░▒▓█", ".:+*#"
COLOURS = ("bright_black", "blue", "cyan", "green", "bright_yellow")


def inspect(
    run: RunArgument,
    as_json: JsonOption = False,
    blocks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Show the N blocks that were selected most; absent: all.")
    ] = None,
) -> None:
    """Show which block was trained when, how often each was selected, and what caused each selection.

    Example: blockllm inspect runs/quickstart/RUN --blocks 20
    """
    from blockllm_cli.tracking.selections import plain

    folder, name, table = _open(run)
    if as_json:
        print_json({"run": str(folder.path), "method": name, **plain(table)})
        return
    from blockllm_cli.tracking.consoles import output_console

    console = output_console()
    for line in _page(folder, name, table, blocks, min(WIDTH, console.width), is_plain=console.options.ascii_only):
        console.print(line, markup=False)


def _open(run: Path) -> tuple[RunFolder, str, SelectionTable]:
    """The run, its method's name, and its selections.

    Raises:
        InputError: there are none, or the folder or its files are not those of a run.
    """
    from blockllm_cli.tracking.run_folder import EVENTS, METRICS, RunFolder, read_json_lines
    from blockllm_cli.tracking.selections import read_selections, table_of

    if not run.is_dir():
        raise InputError(f"{run} is not a folder; inspect takes the folder of a run")
    folder = RunFolder.existing(run)
    name = _method_of(folder)
    if not (folder.path / EVENTS).is_file():
        raise InputError(f"{run} has no {EVENTS}: the run ended before it began to train, or the file was removed")
    selections = read_selections(folder.path / EVENTS)
    summary = folder.summary()
    updates = summary["steps"] if summary else max((r["step"] for r in read_json_lines(run / METRICS)), default=0)
    if not selections:
        why = f"{name} made none in its {updates:,} updates; methods that choose blocks, such as blockllm, do"
        raise InputError(f"{run} has no selection to show: {why if updates else 'it has done no update yet'}")
    return folder, name, table_of(selections, last=updates, parameters=_parameters_of(folder))


def _method_of(folder: RunFolder) -> str:
    from blockllm_cli.tracking.run_folder import RECIPE

    try:
        method = tomllib.loads((folder.path / RECIPE).read_text(encoding="utf-8"))["method"]
        return str(method["name"]) + (f" ({method['variant']})" if "variant" in method else "")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder.path / RECIPE} does not name a method: {error}") from error


def _parameters_of(folder: RunFolder) -> list[str]:
    """The model's parameters in its order; none where the plan does not tell."""
    from blockllm_cli.tracking.run_folder import PLAN

    try:
        tensors = json.loads((folder.path / PLAN).read_text(encoding="utf-8"))["tensors"]
        return [tensor["name"] for tensor in tensors if tensor["category"] == "weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _page(
    folder: RunFolder, name: str, table: SelectionTable, count: int | None, width: int, *, is_plain: bool
) -> Iterator[str | Text]:
    newest = table.selections[-1]
    yield f"{folder.path}: {name}, updates 1 to {table.last:,}"
    yield f"candidates   {newest.candidates:,} entries in {len(table.blocks):,} blocks"
    yield (
        f"budget       {newest.budget:,} entries ({_share(newest.budget, newest.candidates)} of the candidates), "
        f"{newest.kept:,} kept since update {newest.step:,} ({_share(newest.kept, newest.budget)} of the budget)"
    )
    yield ""
    shown = table.blocks if count is None else table.most_visited(count)
    yield from _map(table, shown, width, is_plain=is_plain)
    if len(shown) < len(table.blocks):
        yield f"({len(table.blocks) - len(shown):,} more blocks, selected no more often, are not shown)"
    yield ""
    causes = ", ".join(f"{cause} {times:,}" for cause, times in table.causes.items())
    yield f"selections   {len(table.selections):,}: {causes}"
    yield from _list(table.selections)


def _map(table: SelectionTable, shown: Sequence[BlockHistory], width: int, *, is_plain: bool) -> Iterator[str | Text]:
    """A row per block, a column per stretch of updates; what its block did there as a shade."""
    from blockllm_cli.tracking.selections import bins_of

    labels = [_label(block.name, is_plain=is_plain) for block in shown]
    label_width = max(map(len, [*labels, "selections"]))
    figures = f"{'visits':>7}{'norm':>10}{'at':>8}"
    bins = bins_of(table.last, max(1, width - label_width - 1 - len(figures)))
    yield f"{'block':<{label_width}} {'updates':<{len(bins)}.{len(bins)}}{figures}"
    for label, block in zip(labels, shown, strict=True):
        norm = "-" if block.norm is None else f"{block.norm:.3g}"
        measured = "-" if block.measured is None else f"{block.measured:,}"
        row = _shaded(block, bins, is_plain=is_plain)
        yield _joined(f"{label:<{label_width}} ", row, f"{block.visits:>7,}{norm:>10}{measured:>8}")
    steps = [selection.step for selection in table.selections]
    marks = "".join("^" if any(first <= step <= last for step in steps) else " " for first, last in bins)
    yield f"{'selections':<{label_width}} {marks}".rstrip()
    yield f"{'':<{label_width}} {'1':<{len(bins) - len(f'{table.last:,}')}}{table.last:,}"
    yield _legend(bins, is_plain=is_plain)


def _shaded(block: BlockHistory, bins: Sequence[Span], *, is_plain: bool) -> Text:
    from rich.text import Text

    row = Text()
    for first, last in bins:
        quarters = -(-4 * block.updates_within((first, last)) // (last - first + 1))
        row.append((PLAIN_SHADES if is_plain else SHADES)[quarters], COLOURS[quarters])
    return row


def _joined(*parts: str | Text) -> Text:
    from rich.text import Text

    return Text.assemble(*parts)


def _legend(bins: Sequence[Span], *, is_plain: bool) -> str:
    shades = PLAIN_SHADES if is_plain else SHADES
    length = bins[0][1] - bins[0][0] + 1
    each = "an update" if length == 1 else f"{length:,} updates"
    return f"a column is {each}; {shades[0]} not trained, {shades[-1]} trained in all of it; ^ a selection"


def _label(name: str, *, is_plain: bool) -> str:
    """A block's name without what all share: `model.layers.3.mlp.up_proj.weight@0:64` is `3 up_proj@0:64`."""
    tensor, _, rows = name.partition("@")
    match = re.fullmatch(r"model\.layers\.(\d+)(?:\.(?:self_attn\.|mlp\.)?(\w+)\.weight)?", tensor)
    if match:
        short = f"{match[1]} {match[2]}" if match[2] else f"layer {match[1]}"
    else:
        short = tensor.removeprefix("model.").removesuffix(".weight")
    short += f"@{rows}" if rows else ""
    ends = "~" if is_plain else "…"
    return short if len(short) <= LABEL_WIDTH else short[: LABEL_WIDTH - 1] + ends


def _list(selections: Sequence[Selection]) -> Iterator[str]:
    """The newest selections, one a line."""
    if len(selections) > LISTED:
        yield f"the newest {LISTED} (--json has all):"
    yield f"{'number':>8}{'update':>10}  {'cause':<14}{'blocks':>8}{'new':>6}{'kept':>10}{'of budget':>11}"
    before: set[str] = set()
    for number, selection in enumerate(selections, 1):
        names = {block.name for block in selection.blocks}
        if number > len(selections) - LISTED:
            yield (
                f"{number:>8,}{selection.step:>10,}  {selection.cause:<14}{len(names):>8,}{len(names - before):>6,}"
                f"{format_count(selection.kept):>10}{_share(selection.kept, selection.budget):>11}"
            )
        before = names


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
