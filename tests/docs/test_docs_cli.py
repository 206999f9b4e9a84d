"""docs/cli.md names every exit code and every environment variable, and no other."""

import ast
import re
import signal
from collections.abc import Iterator
from pathlib import Path

from blockllm_cli import app
from blockllm_cli.errors import ExitCode

ROOT = Path(__file__).parents[2]
# Read by rich and by the client libraries of the hub rather than by us.
READ_BY_OTHERS = {"NO_COLOR", "FORCE_COLOR", "TERM", "HF_ENDPOINT"}


def section(title: str) -> str:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def variables_read() -> Iterator[str]:
    """Names that the package asks `os.environ` for, and those of tuples called ..._VARIABLES."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(value=owner, attr=called), args=[ast.Constant(value=str(name)), *_]):
                    if ast.unparse(owner) == "os.environ" or (ast.unparse(owner), called) == ("os", "getenv"):
                        yield name
                case ast.Subscript(value=owner, slice=ast.Constant(value=str(name))):
                    if ast.unparse(owner) == "os.environ":
                        yield name
                case ast.Assign(targets=[ast.Name(id=tuple_name)], value=ast.Tuple(elts=names)):
                    if tuple_name.endswith("_VARIABLES"):
                        yield from (name.value for name in names if isinstance(name, ast.Constant))


def test_every_environment_variable_is_documented_and_exists():
    documented = set(re.findall(r"`([A-Z][A-Z_]{3,})(?:=\w+)?`", section("Environment variables")))
    read = set(variables_read())
    assert "BLOCKLLM_CACHE" in read
    assert read <= documented, "put them into docs/cli.md"
    assert documented <= read | READ_BY_OTHERS, "nobody reads them"


def test_every_exit_code_is_documented():
    documented = {
        int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", section("Exit codes"), re.M) for code in cell.split(",")
    }
    ours = {int(code) for code in ExitCode}
    assert documented == ours | {128 + signal.SIGINT, 128 + signal.SIGTERM, app.SIGPIPE_STATUS}


def test_the_commands_with_json_and_quiet_are_those_that_print_a_result():
    """A new command has to think of both."""
    without_json, with_quiet = set(), set()
    for name in app.COMMANDS:
        command = app.load_command(name)
        for called, one in getattr(command, "commands", {"": command}).items():
            options = {option for parameter in one.params for option in parameter.opts}
            full = f"{name} {called}".rstrip()
            if "--json" not in options:
                without_json.add(full)
            if "--quiet" in options:
                with_quiet.add(full)
    assert without_json == {"recipes copy"}
    assert {"pretrain", "evaluate", "methods check"} <= with_quiet
