"""What a shell is offered after TAB, and what that costs."""

import json
import os
import subprocess
import sys

import pytest

from blockllm_cli.commands import completion
from blockllm_cli.recipe.sections import SECTIONS

HEAVY = {"torch", "numpy", "datasets", "wandb", "transformers", "pyarrow", "matplotlib", "sentencepiece"}


def offered(line: str, tmp_path, shell: str = "bash") -> list[str]:
    """What bash is offered for the last word of `line`; asserts that nothing heavy was imported for it."""
    words = line.split(" ")
    code = (
        "import json, sys; from blockllm_cli.app import main\n"
        "try: status = main([])\n"
        "except SystemExit as error: status = error.code\n"
        "print('\\n' + json.dumps([status, *sys.modules]))"
    )
    environment = {
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_BLOCKLLM_COMPLETE": f"complete_{shell}",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ | environment
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    *lines, last = done.stdout.splitlines()
    status, *modules = json.loads(last)
    assert status == 0
    assert not {name.partition(".")[0] for name in modules} & HEAVY
    return [line for line in lines if line]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("blockllm pre", ["pretrain"]),
        ("blockllm pretrain c4/", ["c4/60m", "c4/130m", "c4/350m", "c4/1b", "c4/7b"]),
        ("blockllm validate qui", ["quickstart"]),
        ("blockllm recipes show qui", ["quickstart"]),
        ("blockllm pretrain quickstart --method fro", ["frozen"]),
        ("blockllm methods adam", ["adam", "adamw"]),
        ("blockllm methods ch", ["check"]),
        ("blockllm methods check fro", ["frozen"]),
        ("blockllm pretrain --set sch", ["schedule."]),
        ("blockllm pretrain --set schedule.s", ["schedule.steps=", "schedule.shape="]),
        ("blockllm pretrain --set schedule.steps=1 --set checkpoint.k", ["checkpoint.keep="]),
        ("blockllm pretrain --resume latest-", ["latest-good"]),
        ("blockllm pretrain no/such/recipe", []),
    ],
)
def test_bash_is_offered(line, words, tmp_path):
    assert offered(line, tmp_path) == words


def test_zsh_is_offered_words_with_one_line_of_help(tmp_path):
    (line,) = offered("blockllm pretrain --set run.threads", tmp_path, "zsh")
    assert line == """_arguments '*: :(("run.threads=":"CPU threads of torch"))'"""


def test_every_key_of_every_table_is_offered():
    for table, section in SECTIONS.items():
        words = [word for word, _ in completion.settings(f"{table}.")]
        assert words == [f"{table}.{key}=" for key in section.model_fields]
        assert all(len(text) <= 60 and "\n" not in text for _, text in completion.settings(f"{table}."))


@pytest.mark.parametrize(
    ("begun", "words"),
    [
        ("run.on_nonfinite=", ["run.on_nonfinite=stop", "run.on_nonfinite=skip"]),
        ("run.deterministic=t", ["run.deterministic=true"]),
        ("schedule.steps=", []),
        ("schedule.stepps=", []),
        ("nothing.", []),
        ("method.", ["method.name="]),
        ("method.name=adam", ["method.name=adam", "method.name=adamw"]),
        ("method.name=", None),
    ],
)
def test_values_of_keys_with_a_choice(begun, words):
    found = [word for word, _ in completion.settings(begun)]
    assert found == words if words is not None else "method.name=blockllm" in found


def test_runs_are_offered_newest_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("b/20250101-1", "a/20250102-1", "a/20240101-1"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "recipe.toml").touch()
    (tmp_path / "runs" / "a" / "no-run").mkdir()
    assert completion.runs("") == ["runs/a/20250102-1", "runs/b/20250101-1", "runs/a/20240101-1"]
    assert completion.runs("runs/b") == ["runs/b/20250101-1"]
    assert [word for word, _ in completion.places("l")] == ["latest", "latest-good"]


def test_methods_that_clash_do_not_spoil_the_prompt(monkeypatch):
    from blockllm_cli.errors import RecipeError
    from blockllm_cli.methods import registry

    def clash():
        raise RecipeError("two packages offer a method of the same name")

    monkeypatch.setattr(registry, "method_names", clash)
    assert completion.methods("") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_shown_and_installed(shell, tmp_path):
    environment = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "blockllm_cli"]
    shown = subprocess.run([*command, "--show-completion", shell], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0
    assert f"_BLOCKLLM_COMPLETE=complete_{shell}" in shown.stdout
    done = subprocess.run([*command, "--install-completion", shell], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    installed = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file() and "blockllm" in path.name)
    assert f"_BLOCKLLM_COMPLETE=complete_{shell}" in installed
