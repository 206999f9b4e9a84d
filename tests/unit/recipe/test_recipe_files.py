"""Files that are no recipes: missing, a folder, not UTF-8, not TOML."""

import os
from pathlib import Path

import pytest

from blockllm_cli.errors import ExitCode, RecipeError
from blockllm_cli.recipe.files import find_recipe, read_recipe_file
from blockllm_cli.recipe.shipped import shipped_folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(content: bytes) -> str:
    Path("my.toml").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_recipe_file(Path("my.toml"))
    assert caught.value.exit_code == ExitCode.USAGE
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbf[run]\n", "my.toml:1: begins with a UTF-8 byte order mark"),
        ("[run]\n".encode("utf-16"), "my.toml:1: begins with a UTF-16 byte order mark"),
        (b"[run]\nname = 'na\xefve'\n", "my.toml:2: not UTF-8 (byte 0xef)"),
        (
            b"[run]\nname = auto\n",
            "my.toml:2: not valid TOML: Invalid value (column 8) in: name = auto; text needs quotes",
        ),
        (b"[run]\nflag = True\n", "booleans are true and false"),
        (b"[run]\n\nname =\n", "my.toml:3: not valid TOML"),
        (b"[run]\nname = 'a'\nname = 'b'\n", "my.toml:3: not valid TOML: Cannot overwrite a value"),
        (b"[run]\n[run]\n", "my.toml:2: not valid TOML"),
        (b"a = [1,\n2,\n", "my.toml:2: not valid TOML"),
        (b"[run\n", "my.toml:1: not valid TOML"),
        (b"a = 1\r\nb = \r\n", "my.toml:2: not valid TOML"),
        (b"a = \x00\n", "my.toml:1: not valid TOML"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b"a = " + b"9" * 5000, "not valid TOML"),
        (b"\x7fELF\x00\x00", "my.toml:1: not valid TOML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_line(content: bytes, expected: str) -> None:
    assert expected in refusal(content)


def test_a_file_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    Path("my.toml").write_text("", encoding="utf-8")
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(RecipeError, match=r"my\.toml: cannot be read: Permission denied"):
        read_recipe_file(Path("my.toml"))


def test_a_path_comes_before_the_name_of_a_shipped_recipe() -> None:
    assert find_recipe("quickstart") == shipped_folder() / "quickstart.toml"
    assert find_recipe("c4/60m.toml") == shipped_folder() / "c4/60m.toml"
    Path("quickstart").write_text("", encoding="utf-8")
    assert find_recipe("quickstart") == Path("quickstart")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("quickstrat", "there is no recipe quickstrat; did you mean quickstart?"),
        ("quickstrat.toml", "did you mean quickstart?"),
        ("c4/600m", "did you mean c4/60m?"),
        ("mein.toml", "did you mean mine.toml?"),
        ("zzzzzzzz", "there is no recipe zzzzzzzz; shipped recipes: quickstart"),
        ("nowhere/zzzzzz", "there is no recipe nowhere/zzzzzz"),
    ],
)
def test_a_recipe_that_does_not_exist(argument: str, expected: str) -> None:
    Path("mine.toml").write_text("", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        find_recipe(argument)
    assert expected in str(caught.value)


def test_a_name_that_cannot_be_a_file_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot be read: File name too long"):
        find_recipe("[run]" * 1000)


def test_a_pipe_can_be_a_recipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert find_recipe("pipe") == Path("pipe")


def test_a_folder_is_no_recipe() -> None:
    Path("some").mkdir()
    with pytest.raises(RecipeError, match=r"some is a folder, not a recipe$"):
        find_recipe("some")
    Path("some/a.toml").write_text("", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"some is a folder, not a recipe; it holds some/a\.toml"):
        find_recipe("some")


def test_a_folder_does_not_hide_the_shipped_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert find_recipe("quickstart").name == "quickstart.toml"
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").write_text("")
    assert find_recipe("quickstart") == Path("quickstart"), "a file of one's own comes first"
