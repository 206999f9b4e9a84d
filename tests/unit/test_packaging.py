"""The package and the commands around it: what it needs to run, what it ships, what `make` does."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from blockllm_cli import __version__
from blockllm_cli.recipe.shipped import shipped_folder, shipped_names
from support.tiny import TinyRuns

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OPTIONAL = ("datasets", "wandb", "pyarrow", "pandas", "transformers", "tokenizers", "matplotlib", "triton")
TARGETS = [
    "setup",
    "quickstart",
    "test",
    "test-all",
    "test-gpu",
    "lint",
    "typecheck",
    "format",
    "bench",
    "bench-setup",
    "tables",
    "docs",
    "clean",
    "help",
]
SIZES = ("60m", "130m", "350m", "1b", "7b")

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def without(modules: tuple[str, ...], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` where `modules` are as if not installed."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({modules!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + code, *arguments], capture_output=True, text=True, check=False
    )


MAIN = "from blockllm_cli.app import main; sys.exit(main(sys.argv[1:]))"


def test_every_module_imports_without_the_optional_packages() -> None:
    done = without(
        (*OPTIONAL, "zstandard"),
        "import importlib, pkgutil, blockllm_cli\n"
        "names = [m.name for m in pkgutil.walk_packages(blockllm_cli.__path__, 'blockllm_cli.')]\n"
        "names.remove('blockllm_cli.__main__')\n"
        "names.remove('blockllm_cli.optim.triton_kernels')\n"  # is Triton, and imported by nothing at its top
        "assert len(names) > 40, names\n"
        "for name in names: importlib.import_module(name)\n",
    )
    assert done.returncode == 0, done.stderr


def test_recipes_work_without_torch_and_the_optional_packages() -> None:
    done = without((*OPTIONAL, "torch"), MAIN, "recipes", "list")
    assert done.returncode == 0, done.stderr
    for name in ("quickstart", *(f"c4/{size}" for size in SIZES)):
        assert re.search(rf"^{name}\b", done.stdout, re.MULTILINE), done.stdout


def test_training_from_files_works_without_the_optional_packages(tiny: TinyRuns) -> None:
    done = without(OPTIONAL, MAIN, *tiny.command("--set", "schedule.steps=5")[1:])
    assert done.returncode == 0, done.stderr
    assert tiny.newest().summary["status"] == "completed"


def test_a_blocked_module_really_is_one() -> None:
    """The three tests above rest on this."""
    assert "ModuleNotFoundError" in without(("json",), "import json").stderr


def test_the_wheel_ships_every_recipe_of_the_tree() -> None:
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"recipes": "blockllm_cli/recipes"}
    in_tree = {path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.toml")}
    shipped = {path.relative_to(shipped_folder()).as_posix() for path in shipped_folder().rglob("*.toml")}
    assert shipped == in_tree
    assert {"quickstart", *(f"c4/{size}" for size in SIZES)} <= set(shipped_names())


def test_the_command_its_module_and_the_version() -> None:
    for command in ([str(Path(sys.executable).with_name("blockllm"))], [sys.executable, "-m", "blockllm_cli"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"blockllm {__version__}\n"


def test_the_licence_is_the_one_declared() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_changelog_has_a_place_for_changes() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run make in the checkout, as from a plain shell."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment.pop("BLOCKLLM_SHARED", None)
    given = [f"{name}={value}" for name, value in variables.items()]
    return subprocess.run(
        ["make", *arguments, *given], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@needs_make
def test_make_alone_lists_the_targets() -> None:
    listed = make().stdout
    assert make("help").stdout == listed
    for target in TARGETS:
        assert re.search(rf"^  {target} +\w", listed, re.MULTILINE), target
    assert all(size in listed for size in SIZES)


@needs_make
@pytest.mark.parametrize("target", [*TARGETS, *(f"c4-{size}" for size in SIZES)])
def test_every_target_works_from_a_bare_checkout(target: str, tmp_path: Path) -> None:
    """Each target that runs something makes the environment first; a dry run shows its commands."""
    venv = tmp_path / "venv"
    done = make("--dry-run", target, VENV=str(venv), DATA="shards")
    assert done.returncode == 0, done.stderr
    needs_environment = target not in ("clean", "help")
    assert (f"-m venv {venv}" in done.stdout) is needs_environment
    needs_development = needs_environment and target != "quickstart" and not target.startswith("c4-")
    assert ("[dev]" in done.stdout) is needs_development
    if target.startswith("c4-"):
        assert f"{venv}/bin/blockllm pretrain c4/{target[3:]}" in done.stdout


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """A python3 that makes environments of nothing and writes down what its pip is asked for.

    Files beside it decide: `version` is its minor version, `report` what pip says it would install.
    """
    script = tmp_path / "python3"
    script.write_text(
        f"""#!/bin/sh
here={tmp_path}
case "$*" in
    "--version") echo "Python 3.$(cat "$here/version")" ;;
    "-c "*) [ "$(cat "$here/version")" -ge 11 ] ;;
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; printf '#!/bin/sh\\necho ran "$@"\\n' > "$3/bin/blockllm"
        chmod +x "$3/bin/blockllm" ;;
    *--report*) cp "$here/report" {tmp_path}/venv/torch.json ;;
    "-m pip install "*) echo "$@" >> "$here/installed" ;;
esac
""",
        encoding="utf-8",
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "version").write_text("11", encoding="utf-8")
    (tmp_path / "report").write_text('{"install": [{"metadata": {"name": "torch"}}]}', encoding="utf-8")
    return script


def installed(python: Path) -> list[str]:
    record = python.with_name("installed")
    return record.read_text(encoding="utf-8").splitlines() if record.exists() else []


@needs_make
def test_quickstart_makes_the_environment_once_and_runs_the_recipe(fake_python: Path) -> None:
    variables = {"PYTHON": str(fake_python), "VENV": str(fake_python.with_name("venv")), "NVIDIA": ""}
    first = make("quickstart", **variables, ARGS="--set run.seed=1")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == "ran pretrain quickstart --set run.seed=1"
    assert installed(fake_python) == ["-m pip install -qq torch==2.13.0", "-m pip install -qq --editable ."]
    make("quickstart", **variables)
    assert len(installed(fake_python)) == 2


@needs_make
def test_an_old_python_is_refused_with_its_version(fake_python: Path) -> None:
    fake_python.with_name("version").write_text("9", encoding="utf-8")
    done = make("test", PYTHON=str(fake_python), VENV=str(fake_python.with_name("venv")))
    assert done.returncode == 2
    assert "Python 3.9; Python 3.11 or newer is needed" in done.stdout
    assert not fake_python.with_name("venv").exists()


@needs_make
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has builds for NVIDIA GPUs by default")
def test_a_gpu_build_of_torch_without_a_gpu_is_noted_with_the_way_to_a_smaller_one(fake_python: Path) -> None:
    names = '{"install": [{"metadata": {"name": "torch"}}, {"metadata": {"name": "nvidia-cublas"}}]}'
    fake_python.with_name("report").write_text(names, encoding="utf-8")
    place = {"PYTHON": str(fake_python), "VENV": str(fake_python.with_name("venv"))}
    noted = make("quickstart", **place, NVIDIA="")
    assert noted.returncode == 0
    assert "make setup TORCH='torch --index-url URL'" in noted.stdout
    assert installed(fake_python)[0] == "-m pip install -qq torch==2.13.0"
    for number, changed in ((2, {"NVIDIA": "yes"}), (4, {"NVIDIA": "", "TORCH": "torch"})):
        shutil.rmtree(place["VENV"])
        silent = make("quickstart", **place, **changed)
        assert silent.returncode == 0
        assert "several gigabytes" not in silent.stdout
        assert installed(fake_python)[number] == f"-m pip install -qq {changed.get('TORCH', 'torch==2.13.0')}"


@needs_make
def test_tables_without_data_say_what_is_missing(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()
    for stamp in (".ready", ".ready-dev"):
        (venv / stamp).touch()
    done = make("tables", VENV=str(venv))
    assert done.returncode == 2
    assert "make tables DATA=FOLDER" in done.stdout


def test_the_whole_check_is_a_program_that_bash_understands() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    if shutil.which("bash"):
        subprocess.run(["bash", "-n", str(script)], check=True)
