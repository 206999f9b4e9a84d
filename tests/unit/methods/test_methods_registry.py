"""Methods by name: files of the package, entry points of others, and what happens when they clash."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from blockllm_cli.errors import RecipeError
from blockllm_cli.methods import registry
from blockllm_cli.methods.base import Method
from blockllm_cli.methods.registry import method_class, method_names

PLUGIN = """
from blockllm_cli.methods.adamw import AdamW

class Halved(AdamW):
    name = "halved"

not_a_class = 3
"""


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Let another package offer `points`, pairs of a method name and a place."""
    (tmp_path / "halved_plugin.py").write_text(PLUGIN, encoding="utf-8")
    (tmp_path / "broken_plugin.py").write_text("import no_such_package_anywhere\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def offered(*points: tuple[str, str]) -> None:
        found = [EntryPoint(name, value, registry.GROUP) for name, value in points]
        monkeypatch.setattr(registry, "entry_points", lambda *, group: found if group == "blockllm.methods" else [])

    yield offered
    for module in ("halved_plugin", "broken_plugin"):
        sys.modules.pop(module, None)


def test_every_name_is_a_file_with_one_method_of_that_name() -> None:
    names = method_names()
    assert {"adam", "adamw", "frozen", "sgd"} <= set(names)
    assert names == sorted(names)
    for name in names:
        found = method_class(name)
        assert issubclass(found, Method)
        assert found.name == name
        assert f"{found.__module__}.".startswith(f"blockllm_cli.methods.{name}.")


def test_names_are_known_without_importing_a_method() -> None:
    code = (
        "import sys; from blockllm_cli.methods.registry import method_names; assert 'adamw' in method_names(); "
        "sys.exit('blockllm_cli.methods.adamw' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "hint"),
    [("adamww", "did you mean adamw?"), ("Frozen", "did you mean frozen?"), ("zzzz", "the methods are adam, adamw")],
)
def test_a_name_that_no_method_has_is_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=f'there is no method "{name}"; {hint}'.replace("?", r"\?")):
        method_class(name)


@pytest.mark.parametrize("name", ["base", "registry", "resolve", "dense", "__init__", "../adam", "adamw.py", ""])
def test_files_that_are_no_methods_are_not_offered(name: str) -> None:
    with pytest.raises(RecipeError, match="there is no method"):
        method_class(name)


def test_another_package_can_offer_a_method(offer) -> None:
    offer(("halved", "halved_plugin:Halved"))
    assert "halved" in method_names()
    assert method_class("halved").__module__ == "halved_plugin"
    assert method_class("adamw").__module__ == "blockllm_cli.methods.adamw"


def test_a_clash_of_names_is_an_error_that_names_both(offer) -> None:
    offer(("adamw", "halved_plugin:Halved"))
    with pytest.raises(RecipeError, match=r"halved_plugin:Halved offers a method adamw, which is built in"):
        method_names()
    offer(("halved", "halved_plugin:Halved"), ("halved", "other:Halved"))
    with pytest.raises(RecipeError, match=r":Halved and the entry point other:Halved both offer a method halved"):
        method_class("halved")


def test_a_package_found_twice_on_the_path_clashes_with_nothing(offer) -> None:
    offer(("halved", "halved_plugin:Halved"), ("halved", "halved_plugin:Halved"))
    assert method_names().count("halved") == 1


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("broken_plugin:X", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_package_anywhere'"),
        ("halved_plugin:Missing", "cannot be loaded: AttributeError"),
        ("halved_plugin:not_a_class", "is not a subclass of blockllm_cli.methods.base.Method"),
        ("pathlib:Path", "is not a subclass"),
    ],
)
def test_a_package_that_does_not_work_is_named(offer, place: str, problem: str) -> None:
    offer(("foreign", place))
    assert "foreign" in method_names()
    with pytest.raises(RecipeError) as caught:
        method_class("foreign")
    assert f"method foreign: the entry point {place} {problem}" in str(caught.value)


def test_a_method_file_defines_exactly_one_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two_methods.py").write_text(PLUGIN + "\nclass Other(AdamW):\n    name = 'other'\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TypeError, match="two_methods defines 2 methods; a method file defines exactly one"):
        registry._only_method("two_methods")
