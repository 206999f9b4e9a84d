"""The selections of a run as a table of plain values and as a picture, for places that show such things.

The picture is SVG text: a row per block, time to the right, darker where the block trained in more of the updates. It
needs no plotting or imaging package and stays sharp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from blockllm_cli.tracking.selections import BlockHistory, SelectionTable, Span, bins_of

BINS = 200
ROWS = 400  # a picture of more blocks shows the most visited
_CELL_WIDTH, _CELL_HEIGHT = 4, 12
_LABEL_WIDTH = 300
_LEVELS = 4  # of darkness


COLUMNS = ("block", "size", "visits", "updates", "share_of_updates", "norm", "norm_measured_at")


def table_rows(table: SelectionTable) -> list[list[Any]]:
    """A row of `COLUMNS` per block, in the model's order."""
    rows: list[list[Any]] = []
    for block in table.blocks:
        updates = block.updates_within((1, table.last))
        share = updates / table.last if table.last else 0.0
        rows.append([block.name, block.size, block.visits, updates, share, block.norm, block.measured])
    return rows


def chart(table: SelectionTable) -> str:
    """The picture as one `<svg>` element."""
    blocks = table.blocks if len(table.blocks) <= ROWS else table.most_visited(ROWS)
    bins = bins_of(table.last, BINS)
    width = _LABEL_WIDTH + _CELL_WIDTH * len(bins)
    height = _CELL_HEIGHT * (len(blocks) + 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="monospace" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_labels(blocks),
        *_cells(blocks, bins),
        *_axis(table, bins, len(blocks)),
        "</svg>",
    ]
    return "\n".join(lines)


def _labels(blocks: Sequence[BlockHistory]) -> Iterator[str]:
    for row, block in enumerate(blocks):
        y = _CELL_HEIGHT * row + _CELL_HEIGHT - 3
        name = escape(block.name.removeprefix("model."))
        yield f'<text x="{_LABEL_WIDTH - 6}" y="{y}" text-anchor="end">{name} ({block.visits})</text>'


def _cells(blocks: Sequence[BlockHistory], bins: Sequence[Span]) -> Iterator[str]:
    """One path for each level of darkness."""
    paths: list[list[str]] = [[] for _ in range(_LEVELS)]
    for row, block in enumerate(blocks):
        for column, (first, last) in enumerate(bins):
            level = -(-_LEVELS * block.updates_within((first, last)) // (last - first + 1))
            if level:
                x, y = _LABEL_WIDTH + _CELL_WIDTH * column, _CELL_HEIGHT * row + 1
                paths[level - 1].append(f"M{x} {y}h{_CELL_WIDTH}v{_CELL_HEIGHT - 2}h-{_CELL_WIDTH}z")
    for level, path in enumerate(paths, 1):
        if path:
            yield f'<path fill="#1b5e9b" fill-opacity="{level / _LEVELS}" d="{"".join(path)}"/>'


def _axis(table: SelectionTable, bins: Sequence[Span], rows: int) -> Iterator[str]:
    """A tick below each stretch with a selection, and the first and the last update."""
    top, right = _CELL_HEIGHT * rows, _LABEL_WIDTH + _CELL_WIDTH * len(bins)
    steps = [selection.step for selection in table.selections]
    for column, (first, last) in enumerate(bins):
        if any(first <= step <= last for step in steps):
            x = _LABEL_WIDTH + _CELL_WIDTH * column + _CELL_WIDTH // 2
            yield f'<path stroke="#c62828" d="M{x} {top}v{_CELL_HEIGHT - 4}"/>'
    y = top + 2 * _CELL_HEIGHT - 3
    yield f'<text x="{_LABEL_WIDTH - 6}" y="{top + _CELL_HEIGHT - 3}" text-anchor="end">selections</text>'
    yield f'<text x="{_LABEL_WIDTH}" y="{y}">update 1</text>'
    yield f'<text x="{right}" y="{y}" text-anchor="end">{table.last:,}</text>'
