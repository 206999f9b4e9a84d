"""Where a run goes on, and what may differ when it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockllm_cli.errors import RecipeError
from blockllm_cli.recipe.load import LoadedRecipe
from blockllm_cli.recipe.sections import Recipe
from blockllm_cli.tracking.run_folder import RunFolder

LATEST, LATEST_GOOD = "latest", "latest-good"

# Where things lie and how often they are written: never part of the numbers.
_FREE = (
    "tracking.",
    "checkpoint.",
    "run.output",
    "data.workers",
    "data.cache",
    "data.revision",  # what is read is identified by its content, and compared
    "data.shard_cache_bytes",
    "data.retry_seconds",
)
# These keep the mathematics and end the promise of equal bits.
_ROUNDING = ("batch.micro_rows", "run.threads", "run.device", "run.compile")


def folder_to_resume(where: str, loaded: LoadedRecipe | None) -> RunFolder:
    """The run that `--resume WHERE` means.

    Args:
        where: `latest`, `latest-good`, or the folder of a run.
        loaded: the recipe given on the command line, if any; `latest` looks for runs of its name.

    Raises:
        RecipeError: `latest` without a recipe.
        InputError: there is no such run.
    """
    if where not in (LATEST, LATEST_GOOD):
        return RunFolder.existing(Path(where))
    if loaded is None:
        raise RecipeError(f"--resume {where} looks for runs of a recipe's name: name a recipe, or the folder of a run")
    return RunFolder.latest(Path(loaded.recipe.run.output), loaded.recipe.run.name)


def check_comparable(saved: Recipe, given: Recipe, folder: Path) -> list[str]:
    """Refuse a recipe that would make another run; return one line for each change that ends bit-exactness.

    Args:
        saved: the resolved recipe in the run folder.
        given: the resolved recipe of this call.
        folder: named in the message.

    Raises:
        RecipeError: a value differs that must not, with the key and both values.
    """
    before, now = _flat(saved.model_dump()), _flat(given.model_dump())
    refused, notes = [], []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new or key.startswith(_FREE):
            continue
        if key == "run.precision" and new == "auto":
            continue
        if key in _ROUNDING:
            notes.append(f"{key} was {old!r}, now {new!r}: from here on the run is not bit-equal to an unbroken one")
        else:
            refused.append(f"  {key}: {old!r} in the run, {new!r} now")
    if refused:
        raise RecipeError(
            f"cannot resume {folder}: the recipe differs from the one it was started with\n"
            + "\n".join(refused)
            + "\nput the values back, or start a new run without --resume"
        )
    return notes


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
