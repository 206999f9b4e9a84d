"""A command, in a process of its own: seconds until it says something or ends, and processor seconds of all of it."""

from __future__ import annotations

import resource
import subprocess
import tempfile
import time
from collections.abc import Sequence

from speed.workers.protocol import Requests


def seconds_to(command: Sequence[str], first: str | None) -> float:
    """Seconds until the command's output has `first` in a line, or until its end if None.

    Raises:
        RuntimeError: the command failed, or never said it.
    """
    with tempfile.TemporaryDirectory(prefix="blockllm-bench-") as place:
        filled = [part.replace("{place}", place) for part in command]
        began = time.perf_counter()
        process = subprocess.Popen(filled, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        took, said = None, []
        for line in process.stdout:
            said.append(line)
            if took is None and first is not None and first in line:
                took = time.perf_counter() - began
        code = process.wait()
        if first is None:
            took = time.perf_counter() - began
        if code or took is None:
            raise RuntimeError(f"{' '.join(filled)} ended with {code}: {''.join(said[-5:])}")
        return took


def main() -> None:
    """Run it until the driver has had enough."""
    requests = Requests()
    command, first = requests.spec["command"], requests.spec.get("first")
    requests.ready()
    for repeat in requests.repeats():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        repeat["wall"] = seconds_to(command, first)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        repeat["cpu"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
