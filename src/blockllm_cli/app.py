"""The command line as a whole: which commands there are, and how a process ends.

Commands are loaded when they are called, so that `blockllm --help` imports none of them.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Literal, NamedTuple

import typer
from typer.core import TyperGroup

from blockllm_cli import __version__
from blockllm_cli.errors import BlockLLMError, ExitCode, InterruptedRunError
from blockllm_cli.heap import keep_memory

SIGPIPE_STATUS = 128 + 13
INTERRUPT_STATUS = 128 + 2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of a stream; our own files raise a StorageError
MARKUP: Literal["markdown"] = "markdown"  # in the other form [method] would be taken for a style


class CommandEntry(NamedTuple):
    """Where a command is, and the line about it in `blockllm --help`."""

    place: str
    summary: str
    panel: str


COMMANDS: dict[str, CommandEntry] = {
    "pretrain": CommandEntry("pretrain:pretrain", "Train a Llama from a recipe, or go on with a run.", "Runs"),
    "evaluate": CommandEntry("evaluate:evaluate", "Compute the perplexity of a run.", "Runs"),
    "generate": CommandEntry("generate:generate", "Continue a prompt with the model of a run.", "Runs"),
    "export": CommandEntry("export:export", "Write a run's model for Hugging Face transformers.", "Runs"),
    "inspect": CommandEntry("inspect:inspect", "Show which block of a run was trained when, and why.", "Runs"),
    "track": CommandEntry("track:track", "Send a run to Weights & Biases afterwards.", "Runs"),
    "recipes": CommandEntry("recipes:app", "List, show and copy the recipes that come with blockllm.", "Recipes"),
    "validate": CommandEntry("validate:validate", "Check a recipe, and print every value it leads to.", "Recipes"),
    "data": CommandEntry("data:app", "Tokenise the data of a recipe ahead of its runs, and look at rows.", "Recipes"),
    "methods": CommandEntry("methods:app", "List the training methods, describe or check one.", "Recipes"),
    "doctor": CommandEntry("doctor:doctor", "Look at this machine: versions, devices, speed, disk.", "Machine"),
}
"""Command name -> `module of blockllm_cli.commands:function or typer app`."""


class LazyGroup(TyperGroup):
    """A group whose commands stand for modules that are imported when one of them is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Name, real command and remaining arguments of a call."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name in COMMANDS else command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; typer would end with 1, our code for a bug, when a reader such as `head` has gone."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise typer.Exit(_reader_gone()) from error


def load_command(name: str) -> Any:
    """Import the command `name` and make it callable from a command line."""
    module, _, attribute = COMMANDS[name].place.partition(":")
    loaded = getattr(import_module(f"blockllm_cli.commands.{module}"), attribute)
    if not isinstance(loaded, typer.Typer):
        function, loaded = loaded, typer.Typer(add_completion=False, rich_markup_mode=MARKUP)
        loaded.command(name)(function)
    return typer.main.get_command(loaded)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"blockllm {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Memory-efficient pretraining of Llama-style models, from recipes.

    Example: blockllm pretrain quickstart
    """


def _stand_in() -> None:
    """Take the place of a command in the list of commands; `LazyGroup` swaps the real one in."""


def _make_app() -> typer.Typer:
    made = typer.Typer(
        cls=LazyGroup,
        name="blockllm",
        no_args_is_help=True,
        rich_markup_mode=MARKUP,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(_root)
    for name, entry in COMMANDS.items():
        made.command(name, short_help=entry.summary, rich_help_panel=entry.panel)(_stand_in)
    return made


app = _make_app()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the status the process ends with.

    Args:
        arguments: what follows `blockllm`; absent: those of the process.
    """
    # GNU OpenMP reads this when torch is loaded. Its threads spin while they wait for each other, and where another
    # program has one of the cores an update then takes many times as long. This many turns cost nothing on idle
    # cores (measured); not to spin at all cost a quarter of the speed there.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    keep_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale without the character of a prompt is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = typer.main.get_command(app).main(
            args=list(sys.argv[1:] if arguments is None else arguments), prog_name="blockllm", standalone_mode=False
        )
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
        if status == INTERRUPT_STATUS:  # what some versions of typer make of a KeyboardInterrupt
            return _say("interrupted", INTERRUPT_STATUS)
        return status if isinstance(status, int) else ExitCode.OK
    except InterruptedRunError as error:
        return _say(f"interrupted: {error}", error.status)
    except BlockLLMError as error:
        return _say(f"error: {error}", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", INTERRUPT_STATUS)
    except BrokenPipeError:
        return _reader_gone()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # what rich makes of it in a page of help
            return _reader_gone()
        raise  # typer's completion ends like this
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM and error.filename is None:
            _reader_gone()
            return _say(f"error: cannot write to stdout: {error.strerror}", ExitCode.STORAGE)
        return _usage_or_bug(error)


def _reader_gone() -> int:
    """Let what is still to be printed vanish (Python flushes stdout at its end, and would complain)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return SIGPIPE_STATUS


def _say(message: str, status: int) -> int:
    from blockllm_cli.tracking.plain import printable

    if sys.stderr is not None:  # closed by the caller; print() would take stdout
        with contextlib.suppress(OSError):  # the status still tells
            print(printable(message), file=sys.stderr, flush=True)
    return int(status)


def _usage_or_bug(error: Exception) -> int:
    """A misuse of the command line is shown by typer; all else is ours, with a traceback that shows no values."""
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):
        from typer import rich_utils

        misuse: Any = error  # typer keeps the class of these to itself
        with contextlib.suppress(OSError):
            rich_utils.rich_format_error(misuse)
        return int(error.exit_code)
    traceback.print_exception(error)
    return _say("this is a bug in blockllm: please report it with the lines above", ExitCode.BUG)
