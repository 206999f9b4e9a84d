"""`blockllm recipes`."""

import json
from pathlib import Path

import pytest

from blockllm_cli.app import main
from blockllm_cli.recipe.load import load_recipe
from blockllm_cli.recipe.shipped import shipped_names


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_list_has_every_recipe_with_its_first_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped_names()
    assert lines[0].startswith("quickstart  A first run: about 5 million parameters")
    assert main(["recipes", "list", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == shipped_names()


def test_show_prints_a_recipe_that_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "c4/60m"]) == 0
    text = capsys.readouterr().out
    assert "extends" not in text
    Path("shown.toml").write_text(text, encoding="utf-8")
    assert load_recipe("shown.toml").recipe == load_recipe("c4/60m").recipe


def test_show_resolved_has_what_the_recipe_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "c4/60m", "--resolved"]) == 0
    text = capsys.readouterr().out
    assert "learning_rate = 0.001 # from: adamw, 60m" in text
    assert "eps = 1e-08 # default of adamw" in text


@pytest.mark.parametrize(
    ("destination", "written"),
    [([], "c4-60m.toml"), (["sub dir"], "sub dir/c4-60m.toml"), (["mine.toml"], "mine.toml"), (["ü.toml"], "ü.toml")],
)
def test_copy_writes_a_file_that_works(
    destination: list[str], written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("sub dir").mkdir()
    assert main(["recipes", "copy", "c4/60m", *destination]) == 0
    assert capsys.readouterr().out == f"{written}\n"
    assert load_recipe(written).recipe == load_recipe("c4/60m").recipe


def test_copy_never_overwrites_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    Path("quickstart.toml").write_text("mine", encoding="utf-8")
    assert main(["recipes", "copy", "quickstart"]) == 2
    assert capsys.readouterr().err == "error: quickstart.toml exists; name another file, or overwrite it with --force\n"
    assert Path("quickstart.toml").read_text(encoding="utf-8") == "mine"
    assert main(["recipes", "copy", "quickstart", "--force"]) == 0
    assert load_recipe("quickstart.toml").recipe.run.name == "quickstart"


def test_copy_says_when_it_cannot_write_and_leaves_nothing(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["recipes", "copy", "quickstart", "no/such/folder.toml"]) == 6
    assert "no/such/folder.toml" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", ["show", "copy"])
def test_a_name_that_does_not_exist_leaves_nothing(
    command: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert main(["recipes", command, "quickstar"]) == 2
    assert capsys.readouterr().err == "error: there is no recipe quickstar; did you mean quickstart?\n"
    assert list(folder.iterdir()) == []
