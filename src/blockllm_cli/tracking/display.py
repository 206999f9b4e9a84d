"""The redrawn lines at the foot of a terminal: bars of what goes on, each line fitted to the width there is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from blockllm_cli.tracking.plain import printable
from blockllm_cli.tracking.progress import Activity

BAR_WIDTH = 12
NARROW = 50
"""Below this many columns figures are worth more than a bar."""

ECHO_WIDTH = 2
"""Columns left free: a terminal writes `^C` where the cursor stands, and a line that wraps cannot be redrawn."""


class Display:
    """Shows activities until it is stopped, and leaves no line behind.

    Args:
        console: a terminal.
        activities: what goes on, outermost first; asked at every redraw.
        notice: a line to show below them, or nothing; asked at every redraw.
        clock: seconds; what the activities measure their time with.
    """

    def __init__(
        self,
        console: Console,
        activities: Callable[[], Iterable[Activity]],
        notice: Callable[[], str],
        clock: Callable[[], float],
    ) -> None:
        self._activities = activities
        self._notice = notice
        self._clock = clock
        self._live = Live(
            self,
            console=console,
            transient=True,
            refresh_per_second=4,
            vertical_overflow="crop",
            # Only what would be written over the bars goes through the display; a file stays a file.
            redirect_stdout=_is_terminal(sys.stdout),
            redirect_stderr=_is_terminal(sys.stderr),
        )
        self._live.start(refresh=True)

    def stop(self) -> None:
        """Remove it."""
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One `Text` a line, none as long as the terminal is wide."""
        now, is_plain = self._clock(), options.ascii_only
        width = max(1, options.max_width - ECHO_WIDTH)
        for activity in self._activities():
            lines = activity.figures(now)
            bar = _bar(activity.share(), is_plain=is_plain) if width >= NARROW else Text()
            yield _fitted(bar, lines[0], width, is_plain=is_plain)
            for parts in lines[1:]:
                yield _fitted(Text(), parts, width, is_plain=is_plain)
        if notice := self._notice():
            yield _fitted(Text(), [notice], width, is_plain=is_plain)


def _is_terminal(stream: object) -> bool:
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and bool(isatty())


def _bar(share: float | None, *, is_plain: bool) -> Text:
    """Done and to do are two characters, so that it can be read without colours."""
    if share is None:
        return Text()
    done, open_ = ("#", "-") if is_plain else ("\u2501", "\u2500")
    filled = int(share * BAR_WIDTH)
    return Text.assemble((done * filled, "bar.complete"), (open_ * (BAR_WIDTH - filled), "bar.back"), " ")


def _one_line(text: str, *, is_plain: bool) -> str:
    """`text` in characters whose width is known and that the terminal has."""
    line = " ".join(printable(text).split())
    return line.encode("ascii", errors="replace").decode("ascii") if is_plain else line


def _fitted(bar: Text, parts: Sequence[str], width: int, *, is_plain: bool) -> Text:
    """`bar` and as many of the parts as fit; the first is cut where that makes room for the second."""
    between = ", " if is_plain else " \u00b7 "
    line, *others = (_one_line(part, is_plain=is_plain) for part in parts)
    room = width - bar.cell_len
    if others and cell_len(line) > (short := room - cell_len(between + others[0])) >= room // 2:
        line = _cut(line, short, is_plain=is_plain)
    for part in others:
        if cell_len(line) + cell_len(between) + cell_len(part) > room:
            break
        line += between + part
    return Text.assemble(bar, _cut(line, room, is_plain=is_plain), no_wrap=True, overflow="crop")


def _cut(line: str, width: int, *, is_plain: bool) -> str:
    cut = Text(line)
    cut.truncate(max(width, 0), overflow="crop" if is_plain else "ellipsis")
    return cut.plain
