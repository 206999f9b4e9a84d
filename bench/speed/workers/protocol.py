"""What a worker and the driver say to each other: JSON lines over the worker's standard input and output.

The driver's first line is the spec. The worker makes everything ready and answers `{"ready": facts}`. Each further line
asks for one repeat and is answered with its seconds; the end of the input ends the worker. Only the standard library is
used here, since this runs in the environments of all peers.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

Spec = dict[str, Any]
Repeat = dict[str, Any]
"""`wall` and `cpu` in seconds, and what else a worker says of a repeat; a worker may give seconds of its own."""


class Requests:
    """The worker's end.

    Standard output is kept for the protocol: what libraries print goes to standard error from here on.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.spec: Spec = json.loads(sys.stdin.readline())

    def ready(self, *packages: str, **facts: Any) -> None:
        """Say that repeats can be asked for, with the versions of `packages`."""
        versions = {name: importlib.metadata.version(name) for name in packages}
        self._send({"ready": {"versions": versions, **facts}})

    def repeats(self) -> Iterator[Repeat]:
        """Yield once for each repeat asked for; what happens until the next is taken from here is what is timed."""
        for _ in sys.stdin:
            repeat: Repeat = {}
            wall, cpu = time.perf_counter(), time.process_time()
            yield repeat
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            self._send({"wall": wall, "cpu": cpu, **repeat})

    def _send(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()
