"""The command line as a whole: what help costs, and how a process ends."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import typer

from blockllm_cli import __version__, app
from blockllm_cli.errors import DivergedError, InputError, InterruptedRunError, RecipeError, StorageError

HEAVY = ("torch", "datasets", "wandb", "transformers", "pyarrow", "matplotlib", "zstandard", "numpy", "pydantic")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Let `blockllm probe` run a function."""

    def install(function) -> None:
        module = types.ModuleType("blockllm_cli.commands.probe")
        vars(module)["probe"] = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(app.COMMANDS, "probe", app.CommandEntry("probe:probe", "Probe.", "Machine"))
        monkeypatch.setattr(app, "app", app._make_app())

    return install


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import json, sys; from blockllm_cli.app import main; status = main(sys.argv[1:]); "
        "print(); print(json.dumps([status, *sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    status, *modules = json.loads(done.stdout.splitlines()[-1])
    assert status == 0
    assert not {name.partition(".")[0] for name in modules} & set(HEAVY)
    assert not [name for name in modules if name.startswith("blockllm_cli.commands")]


@pytest.mark.parametrize("name", app.COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example: blockllm {name}" in text


@pytest.mark.parametrize("name", app.COMMANDS)
def test_a_command_module_imports_nothing_heavy(name: str) -> None:
    code = (
        "import sys; from blockllm_cli.app import load_command; load_command(sys.argv[1]); "
        f"found = set(sys.modules) & {{{', '.join(map(repr, HEAVY[:-2]))}}}; print(found); sys.exit(bool(found))"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    app.main(["--help"])
    text = capsys.readouterr().out
    for name, entry in app.COMMANDS.items():
        assert name in text
        assert entry.summary in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out == f"blockllm {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretran"], "Did you mean 'pretrain'?"),
        (["validate"], "Missing argument"),
        (["validate", "quickstart", "--sett", "x"], "No such option"),
        (["--nope"], "No such option"),
        (["recipes", "lst"], "list"),
    ],
)
def test_misuse_ends_with_2_and_says_why(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(arguments) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.out == ""


def test_no_arguments_show_help_and_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([]) == 2
    captured = capsys.readouterr()
    assert "pretrain" in captured.out + captured.err


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (RecipeError("recipe.toml:3: [method] is odd"), 2, "error: recipe.toml:3: [method] is odd\n"),
        (InputError("no data"), 3, "error: no data\n"),
        (DivergedError("loss is nan"), 5, "error: loss is nan\n"),
        (StorageError("disk full"), 6, "error: disk full\n"),
        (InterruptedRunError("saved", signal.SIGTERM), 143, "interrupted: saved\n"),
        (InterruptedRunError("saved", signal.SIGINT), 130, "interrupted: saved\n"),
    ],
)
def test_an_expected_failure_is_one_message_and_its_code(
    command, capsys: pytest.CaptureFixture[str], error: Exception, status: int, text: str
) -> None:
    def fail() -> None:
        raise error

    command(fail)
    assert app.main(["probe"]) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", text)


def test_a_bug_shows_where_it_happened_and_no_values(command, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        token = "secret-" + "value"
        raise ZeroDivisionError(len(token))

    command(fail)
    assert app.main(["probe"]) == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError: 12" in error
    assert "raise ZeroDivisionError(len(token))" in error
    assert "secret-value" not in error
    assert error.endswith("this is a bug in blockllm: please report it with the lines above\n")


@pytest.mark.parametrize("raised", [KeyboardInterrupt, typer.Abort])
def test_an_interrupt_that_nothing_caught_ends_with_130(
    command, capsys: pytest.CaptureFixture[str], raised: type[BaseException]
) -> None:
    def fail() -> None:
        raise raised

    command(fail)
    assert app.main(["probe"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_command_that_ends_early_keeps_its_code(command) -> None:
    def leave() -> None:
        raise typer.Exit(7)

    command(leave)
    assert app.main(["probe"]) == 7


def test_a_missing_command_module_fails_only_when_it_is_called(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(app.COMMANDS, "later", app.CommandEntry("later:later", "Later.", "Machine"))
    monkeypatch.setattr(app, "app", app._make_app())
    assert app.main(["--help"]) == 0
    assert app.main(["later"]) == 1
    assert "No module named 'blockllm_cli.commands.later'" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away_is_no_error(lines: int, tmp_path: Path) -> None:
    """With one line the pipe breaks at the last flush, with many inside the command."""
    module = tmp_path / "probe_module.py"
    module.write_text(
        "import sys, types\n"
        "from blockllm_cli import app\n"
        "def probe():\n"
        f"    for _ in range({lines}): print('x' * 80)\n"
        "module = types.ModuleType('blockllm_cli.commands.probe'); module.probe = probe\n"
        "sys.modules[module.__name__] = module\n"
        "app.COMMANDS['probe'] = app.CommandEntry('probe:probe', 'Probe.', 'Machine')\n"
        "app.app = app._make_app()\n"
        "sys.exit(app.main(['probe']))\n",
        encoding="utf-8",
    )
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, module], stdout=writing, stderr=subprocess.PIPE, env=buffered, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_locale_without_the_character_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('[run]\nname = "Größe"\n', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "blockllm_cli", "recipes", "show", "own.toml"],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Gr\\xf6\\xdfe" in done.stdout


def test_an_error_cannot_move_the_cursor(command, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise InputError("file \x1b[2J\rname\nsecond line")

    command(fail)
    assert app.main(["probe"]) == 3
    assert capsys.readouterr().err == "error: file \\x1b[2J\\rname\nsecond line\n"


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blockllm_cli", "validate", "nope"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no recipe nope; shipped recipes: quickstart")
