"""Which block was trained when: the selections of events.jsonl as a table. Plain values in, plain values out."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blockllm_cli.errors import InputError
from blockllm_cli.tracking.run_folder import read_json_lines

Span = tuple[int, int]
"""First and last update of a stretch in which a block trains."""


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class SeenBlock(_Event):
    """A block at the moment of a selection.

    Attributes:
        name: of its tensor, slice, layer or group.
        size: elements.
        score: what it was ranked by; None where the order is not by score.
        norm: latest known norm of its gradient, or None.
        age: updates since that was measured, or None.
    """

    name: str
    size: int = Field(ge=0)
    score: float | None
    norm: float | None
    age: int | None


class TakenBlock(SeenBlock):
    """A block that was selected.

    Attributes:
        kept: entries of it that train.
        enters: update from which they do.
    """

    kept: int = Field(ge=0)
    enters: int = Field(ge=1)


class Selection(_Event):
    """One selection.

    Attributes:
        step: update at whose start it was made.
        cause: why then.
        budget: entries that may have state.
        candidates: entries of all blocks.
        kept: entries that train until the next selection.
        share: of each taken block that is kept.
        blocks: taken, by falling score.
        others: the rest.
    """

    step: int = Field(ge=1)
    cause: str
    budget: int
    candidates: int
    kept: int
    share: float
    blocks: tuple[TakenBlock, ...]
    others: tuple[SeenBlock, ...]


@dataclass(frozen=True)
class BlockHistory:
    """What happened to one block.

    Attributes:
        name: of the block.
        size: elements.
        visits: selections that took it.
        spans: when it trained, in order, no two overlapping.
        norm: latest norm in any selection, or None.
        measured: update that norm is from, or None.
    """

    name: str
    size: int
    visits: int
    spans: tuple[Span, ...]
    norm: float | None
    measured: int | None

    def updates_within(self, span: Span) -> int:
        """Updates of `span` in which the block trained."""
        return sum(max(0, min(stop, span[1]) - max(start, span[0]) + 1) for start, stop in self.spans)


@dataclass(frozen=True)
class SelectionTable:
    """All selections of a run, and the history of every block.

    Attributes:
        selections: in order, at least one.
        blocks: in the model's order.
        last: newest update of the run.
    """

    selections: tuple[Selection, ...]
    blocks: tuple[BlockHistory, ...]
    last: int

    @property
    def causes(self) -> dict[str, int]:
        """Cause -> selections, the most frequent first."""
        return dict(Counter(selection.cause for selection in self.selections).most_common())

    def most_visited(self, count: int) -> tuple[BlockHistory, ...]:
        """The `count` blocks that were selected most, ties to the earlier one, in the model's order."""
        ranked = sorted(self.blocks, key=lambda block: -block.visits)[:count]
        return tuple(block for block in self.blocks if block in ranked)


def read_selections(path: Path) -> list[Selection]:
    """The selections of an events.jsonl.

    Raises:
        InputError: a line is damaged, or lacks what belongs to a selection.
    """
    return selections_of(read_json_lines(path), path)


def selections_of(rows: Iterable[Any], source: Path) -> list[Selection]:
    """The selections among `rows`, which stand in `source`.

    Raises:
        InputError: a row is no object, or a selection lacks something or is out of order; the message names the row.
    """
    found: list[Selection] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{source}, row {number}: not an object")
        if row.get("kind") != "selection":
            continue
        try:
            selection = Selection.model_validate(row)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{source}, row {number}: not a selection: {where}: {first['msg']}") from error
        if found and selection.step <= found[-1].step:
            raise InputError(
                f"{source}, row {number}: the selection of update {selection.step} comes after that of {found[-1].step}"
            )
        found.append(selection)
    return found


def table_of(selections: Sequence[Selection], *, last: int, parameters: Sequence[str] = ()) -> SelectionTable:
    """Put selections together.

    Args:
        selections: in order, at least one.
        last: newest update of the run.
        parameters: names of the model's parameters in its order, by which blocks are ordered; those that belong to
            none of them come last, in the order in which they are first named.
    """
    last = max(last, selections[-1].step)
    stops = [*(later.step - 1 for _, later in pairwise(selections)), last]
    spans: dict[str, list[Span]] = {}
    visits: Counter[str] = Counter()
    newest: dict[str, SeenBlock] = {}
    norms: dict[str, tuple[float, int]] = {}
    for selection, stop in zip(selections, stops, strict=True):
        for block in selection.blocks:
            visits[block.name] += 1
            if block.enters <= stop:
                _extend(spans.setdefault(block.name, []), (block.enters, stop))
        for seen in (*selection.blocks, *selection.others):
            newest[seen.name] = seen
            if seen.norm is not None:
                norms[seen.name] = (seen.norm, selection.step - (seen.age or 0))
    places = {name: _place(name, parameters) for name in newest}
    histories = [
        BlockHistory(
            name,
            newest[name].size,
            visits[name],
            tuple(spans.get(name, ())),
            *norms.get(name, (None, None)),
        )
        for name in sorted(newest, key=lambda name: places[name])
    ]
    return SelectionTable(tuple(selections), tuple(histories), last)


def _extend(spans: list[Span], span: Span) -> None:
    """Add `span`, which begins after all others; one that begins where the last ends goes on with it."""
    if spans and spans[-1][1] + 1 == span[0]:
        spans[-1] = (spans[-1][0], span[1])
    else:
        spans.append(span)


def _place(block: str, parameters: Sequence[str]) -> tuple[int, int]:
    """Where a block stands: the index of its first parameter, and the first row of a slice."""
    name, _, rows = block.partition("@")
    start = int(rows.partition(":")[0]) if re.fullmatch(r"\d+:\d+", rows) else 0
    tests = (
        lambda parameter: parameter == name,
        lambda parameter: parameter.startswith(f"{block}."),
        lambda parameter: _finds(block, parameter),
    )
    for test in tests:
        for index, parameter in enumerate(parameters):
            if test(parameter):
                return index, start
    return len(parameters), 0


def _finds(expression: str, name: str) -> bool:
    try:
        return re.search(expression, name) is not None
    except re.error:
        return False


def parameters_in(plan: Path) -> list[str]:
    """The model's parameters in its order, from the plan.json of a run; none where it does not tell."""
    try:
        tensors = json.loads(plan.read_text(encoding="utf-8"))["tensors"]
        return [tensor["name"] for tensor in tensors if tensor["category"] == "weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def bins_of(last: int, width: int) -> list[Span]:
    """Updates 1 to `last` in at most `width` stretches of equal length (the last may be shorter)."""
    length = max(1, -(-last // width))
    return [(start, min(start + length - 1, last)) for start in range(1, last + 1, length)]


def plain(table: SelectionTable) -> Mapping[str, Any]:
    """Everything in the table as plain JSON values."""
    newest = table.selections[-1]
    return {
        "updates": table.last,
        "candidates": newest.candidates,
        "budget": newest.budget,
        "kept": newest.kept,
        "causes": table.causes,
        "selections": [
            {
                "step": selection.step,
                "cause": selection.cause,
                "budget": selection.budget,
                "kept": selection.kept,
                "share": selection.share,
                "blocks": [block.name for block in selection.blocks],
            }
            for selection in table.selections
        ],
        "blocks": [
            {
                "name": block.name,
                "size": block.size,
                "visits": block.visits,
                "updates": block.updates_within((1, table.last)),
                "spans": [list(span) for span in block.spans],
                "norm": block.norm,
                "measured": block.measured,
            }
            for block in table.blocks
        ],
    }
