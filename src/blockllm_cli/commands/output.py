"""Which stream carries what, for every command (docs/cli.md tells users).

stdout has the result: with `--json` one JSON value and nothing else, without it what a person reads, of which the last
line of a command that writes a run is its folder. stderr has errors, warnings and answers to signals, and with
`--json` the narration as well. `--quiet` leaves the narration out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockllm_cli.tracking.terminal import Terminal


def open_terminal(*, as_json: bool = False, quiet: bool = False) -> Terminal:
    """Where a command narrates what it does; enter it as a context manager."""
    from blockllm_cli.tracking.consoles import error_console
    from blockllm_cli.tracking.terminal import Terminal

    return Terminal(error_console() if as_json else None, quiet=quiet)


def print_json(value: Any) -> None:
    """The result of a command under `--json`; a figure that is not finite is null, since JSON has no word for it."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
