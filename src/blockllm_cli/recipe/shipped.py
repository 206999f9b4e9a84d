"""The recipes that come with the package: package data in a wheel, the folder `recipes/` in a checkout."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def shipped_folder() -> Path:
    """The folder of the shipped recipes."""
    packaged = _PACKAGE / "recipes"
    return packaged if packaged.is_dir() else _PACKAGE.parents[1] / "recipes"


def shipped_names() -> list[str]:
    """Names of the shipped recipes, such as `quickstart` and `c4/60m`; files that others extend are not among them."""
    folder = shipped_folder()
    files = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.toml"))
    return sorted((path.as_posix() for path in files if not path.name.startswith("_")), key=_order)


def shipped_path(name: str) -> Path | None:
    """The file of the shipped recipe `name` (with or without `.toml`), or None if there is none of that name."""
    plain = name.removesuffix(".toml")
    return shipped_folder() / f"{plain}.toml" if plain in shipped_names() else None


def summary_of(name: str) -> str:
    """The first sentence of the comment at the top of the shipped recipe `name`."""
    text = (shipped_folder() / f"{name}.toml").read_text(encoding="utf-8")
    heading = takewhile(lambda line: line.startswith("#"), text.splitlines())
    comment = " ".join(line.lstrip("# ").rstrip() for line in heading)
    return comment.partition(". ")[0].rstrip(".") + "."


def _order(name: str) -> tuple[int, float, str]:
    """Recipes before folders; within a folder by model size."""
    stem = name.rpartition("/")[2]
    scale = {"m": 1e6, "b": 1e9}.get(stem[-1:], 0.0)
    size = float(stem[:-1]) * scale if scale and stem[:-1].replace(".", "", 1).isdigit() else 0.0
    return name.count("/"), size, name
