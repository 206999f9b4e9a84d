"""What a run says of the compiler's work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from blockllm_cli.model.compiled import LayerCompiler

_KINDS = {
    (True, True): "",
    (True, False): ", frozen above trained ones,",
    (False, False): ", frozen below trained ones,",
}


class CompilationNotes:
    """Tells of each compilation once, and once that the compiler's limit was reached.

    Args:
        compiler: of the run's model.
    """

    def __init__(self, compiler: LayerCompiler) -> None:
        self._compiler = compiler
        self._told = 0
        self._told_of_limit = False

    @property
    def count(self) -> int:
        """Compilations so far."""
        return len(self._compiler.compilations)

    def news(self) -> Iterator[tuple[dict[str, Any], str, bool]]:
        """What happened since the last call: an event, the same in words, and whether these are a warning."""
        limit = self._compiler.limit
        for compilation in self._compiler.compilations[self._told :]:
            self._told += 1
            yield (
                {"kind": "compilation", "number": self._told, "limit": limit, **asdict(compilation)},
                f"compiled a decoder layer for {compilation.rows} rows of {compilation.positions} positions"
                f"{_KINDS[compilation.differentiated, compilation.feeds]} in {compilation.seconds:.1f} s "
                f"({self._told} of at most {limit})",
                False,
            )
        if self._compiler.refused and not self._told_of_limit:
            self._told_of_limit = True
            yield (
                {"kind": "compilation_limit", "limit": limit},
                f"{limit} compilations were made, which is the limit: batches of further shapes run uncompiled from "
                'here on. run.compile = "off" spares the time that compiling takes; data.layout = "pack" gives batches '
                "of one shape",
                True,
            )
