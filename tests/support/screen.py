"""A terminal as small as our tests need it: what a program under a pseudo terminal leaves on the screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

_PIECE = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|(.)", re.S)
# What the tester's own environment says of terminals.
VARIABLES = ("TERM", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


@dataclass
class Screen:
    """Endless lines of `width` columns; knows the few controls that a display needs, and refuses others."""

    width: int
    lines: list[list[str]] = field(default_factory=lambda: [[]])
    row: int = 0
    column: int = 0
    has_cursor: bool = True

    def feed(self, text: str) -> None:
        for arguments, command, character in _PIECE.findall(text):
            if character:
                self._put(character)
            elif command == "A":
                self.row = max(0, self.row - int(arguments or 1))
            elif command == "K":
                assert arguments == "2", "only whole lines are erased"
                self.lines[self.row] = []
            elif command in "hl" and arguments == "?25":
                self.has_cursor = command == "h"
            elif command != "m":
                raise AssertionError(f"unknown control {arguments}{command}")

    def _put(self, character: str) -> None:
        if character == "\n":
            self._down()
        elif character == "\r":
            self.column = 0
        elif character == "\x07":
            return
        else:
            assert character.isprintable(), repr(character)
            if self.column == self.width:
                self._down()
                self.column = 0
            line = self.lines[self.row]
            line.extend(" " * (self.column + 1 - len(line)))
            line[self.column] = character
            self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])

    @property
    def text(self) -> str:
        return "\n".join("".join(line).rstrip() for line in self.lines).rstrip("\n")


@dataclass
class OnScreen:
    """A program with a pseudo terminal of its own as stdin, stdout and stderr."""

    command: Sequence[str]
    columns: int = 80
    variables: dict[str, str] = field(default_factory=dict)
    output: str = ""

    def __enter__(self) -> OnScreen:
        kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        environment = {**kept, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **self.variables}
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, self.columns, 0, 0))

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        import subprocess

        self._process = subprocess.Popen(
            self.command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, preexec_fn=take_terminal
        )
        os.close(theirs)
        self._descriptor = ours
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._descriptor)

    def read_until(self, words: str, seconds: float = 120) -> None:
        """Wait until `words` were printed."""
        deadline = time.monotonic() + seconds
        while words not in self.output:
            assert time.monotonic() < deadline, self.output
            assert self._read(), f"ended without {words!r}: {self.output}"

    def press(self, key: bytes) -> None:
        os.write(self._descriptor, key)

    def end(self, seconds: float = 120) -> int:
        """Read to the end; the exit status."""
        deadline = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < deadline, self.output
        return self._process.wait(seconds)

    @property
    def screen(self) -> Screen:
        screen = Screen(self.columns)
        screen.feed(self.output)
        return screen

    def _read(self) -> bool:
        try:
            chunk = os.read(self._descriptor, 65536)
        except OSError:  # the other side is gone
            return False
        self.output += chunk.decode("utf-8", errors="replace")
        return bool(chunk)
