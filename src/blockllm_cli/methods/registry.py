"""Which methods there are. A method's name is that of its file or folder here, or of an entry point elsewhere.

Only a method's class needs torch: a shell that completes a name must not wait for that.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from blockllm_cli.errors import RecipeError
from blockllm_cli.recipe.names import nearest

if TYPE_CHECKING:
    from blockllm_cli.methods.base import Method

GROUP = "blockllm.methods"
"""Entry-point group in which other packages name their methods: `name = "package.module:Class"`."""

_PACKAGE = "blockllm_cli.methods"
_NOT_METHODS = frozenset({"__init__", "base", "dense", "registry", "resolve"})


def method_names() -> list[str]:
    """Names of all methods, without importing any.

    Raises:
        RecipeError: two packages offer a method of the same name.
    """
    return sorted([*_built_in(), *_plugins()])


def method_class(name: str) -> type[Method]:
    """The class of the method `name`.

    Raises:
        RecipeError: there is no such method, or the package that offers it does not work.
    """
    plugins = _plugins()
    if name in plugins:
        return _load(plugins[name])
    if name not in _built_in():
        raise RecipeError(f'there is no method "{name}"; {suggest_method(name)}')
    return _only_method(f"{_PACKAGE}.{name}")


def suggest_method(name: str) -> str:
    """A hint for a name that no method has."""
    names = method_names()
    near = nearest(name.replace("-", "_"), names)
    return f"did you mean {near}?" if near else f"the methods are {', '.join(names)}"


def _built_in() -> list[str]:
    here = Path(__file__).parent
    files = [path.stem for path in here.glob("*.py") if path.stem not in _NOT_METHODS]
    return files + [path.parent.name for path in here.glob("*/__init__.py")]


def _plugins() -> dict[str, EntryPoint]:
    """Entry points by method name."""
    built_in = set(_built_in())
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in built_in:
            raise RecipeError(
                f"{_owner(point)} offers a method {point.name}, which is built in; uninstall the package, or have it "
                f"renamed"
            )
        if point.name in found and found[point.name].value != point.value:
            raise RecipeError(
                f"{_owner(found[point.name])} and {_owner(point)} both offer a method {point.name}; uninstall one"
            )
        found[point.name] = point
    return found


def _owner(point: EntryPoint) -> str:
    return f"the package {point.dist.name} ({point.value})" if point.dist else f"the entry point {point.value}"


def _load(point: EntryPoint) -> type[Method]:
    from blockllm_cli.methods.base import Method

    try:
        loaded = point.load()
    except Exception as error:  # whatever a foreign package raises, the user needs to know which one it was
        raise RecipeError(
            f"method {point.name}: {_owner(point)} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not (inspect.isclass(loaded) and issubclass(loaded, Method)):
        raise RecipeError(f"method {point.name}: {_owner(point)} is not a subclass of blockllm_cli.methods.base.Method")
    return loaded


def _only_method(module_name: str) -> type[Method]:
    """The one class in the module's namespace that is a method and is defined there, or inside of that folder."""
    module = import_module(module_name)
    found = list(_methods_defined_in(module_name, vars(module).values()))
    if len(found) != 1:
        raise TypeError(f"{module_name} defines {len(found)} methods; a method file defines exactly one")
    return found[0]


def _methods_defined_in(module_name: str, values: Iterable[object]) -> Iterable[type[Method]]:
    from blockllm_cli.methods.base import Method

    for value in values:
        if (
            inspect.isclass(value)
            and issubclass(value, Method)
            and f"{value.__module__}.".startswith(f"{module_name}.")
            and not inspect.isabstract(value)
        ):
            yield value
