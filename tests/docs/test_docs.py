"""What the documentation says is what the code does."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_reference_is_what_the_code_says():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), "--check"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout


def documented_commands():
    """Commands in the code blocks of README, CONTRIBUTING and docs."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        for block in re.findall(r"```(?:sh|bash|console)?\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.removeprefix("$ ").split("  #")[0].strip()
                if command.startswith(("blockllm ", "make ")):
                    yield pytest.param(command, id=f"{page.name}: {command[:60]}")


@pytest.mark.parametrize("command", list(documented_commands()))
def test_every_documented_command_exists(command):
    """Each verb and each option of every command in the documentation is known to the program, each target to make."""
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        targets += [f"c4-{size}" for size in ("60m", "130m", "350m", "1b", "7b")]
        assert all("=" in word or word in targets for word in words[1:]), command
        return
    from typer.testing import CliRunner

    from blockllm_cli.app import app

    options = [word.split("=")[0] for word in words if word.startswith("--")]
    verbs = [word for word in words[1:3] if re.fullmatch(r"[a-z]+", word)]
    for depth in (2, 1):
        shown = CliRunner().invoke(app, [*verbs[:depth], "--help"], env={"COLUMNS": "200"})
        if shown.exit_code == 0:
            break
    assert shown.exit_code == 0, command
    missing = [option for option in options if option not in shown.output]
    assert not missing, (command, missing)


def test_every_local_link_leads_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
