"""What the environment may say of a terminal, and what a file must be spared."""

import io
import os
import pty
import sys

import pytest

from blockllm_cli.tracking import consoles

VARIABLES = ("TERM", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


@pytest.fixture
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return monkeypatch


@pytest.fixture
def screen(environment):
    """Makes the console of a process whose stdout is a pseudo terminal of 80 columns."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:

        def console(**variables):
            environment.setattr(sys, "stdout", stream)  # not before: the test's own capture comes after fixtures
            for name, value in variables.items():
                environment.setenv(name, value)
            return consoles.output_console()

        yield console
    os.close(ours)


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {"TTY_INTERACTIVE": "1"}])
def test_a_file_is_never_redrawn_r31(environment, variables):
    for name, value in variables.items():
        environment.setenv(name, value)
    environment.setattr(sys, "stdout", io.StringIO())
    assert not consoles.output_console().is_interactive


def test_a_terminal_is(screen):
    console = screen()
    assert console.is_interactive
    assert console.width == 80
    assert not console.no_color


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_be_redrawn_gets_lines(screen, term):
    assert not screen(TERM=term).is_interactive


def test_no_color_is_heard(screen):
    assert screen(NO_COLOR="1").no_color


@pytest.mark.parametrize(("columns", "width"), [("40", 40), ("200", 80), ("80", 80), ("", 80), ("many", 80)])
def test_columns_may_make_it_narrower_than_it_is_but_not_wider(screen, columns, width):
    assert screen(COLUMNS=columns).width == width


def test_no_stdout_is_no_reason_to_fail(environment):
    environment.setattr(sys, "stdout", None)
    console = consoles.output_console()
    assert not console.is_interactive
    console.print("nobody hears")
