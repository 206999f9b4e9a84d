"""What a recipe may ask for that this version cannot do yet: valid as a recipe, refused before a run."""

from __future__ import annotations

from blockllm_cli.errors import RecipeError
from blockllm_cli.recipe.load import LoadedRecipe
from blockllm_cli.recipe.origins import Problem, joined

_OWN_TEXT = "use your own files: --set data.corpus=files --set 'data.train=DIR/*.jsonl', or --set data.corpus=builtin"
_OWN_TOKENIZER = (
    "train one: --set tokenizer.source=train --set tokenizer.vocab_size=32000, or read a sentencepiece model: "
    "--set tokenizer.source=file --set tokenizer.path=FILE"
)


def unavailable(loaded: LoadedRecipe) -> list[str]:
    """One line, with file and line, for everything in the recipe that this version cannot do."""
    return [loaded.line(problem) for problem in _problems(loaded)]


def refuse_unavailable(loaded: LoadedRecipe) -> None:
    """Refuse a recipe that this version cannot run.

    Raises:
        RecipeError: with one line per reason, and what to use in its place.
    """
    lines = unavailable(loaded)
    if lines:
        raise RecipeError(joined(lines))


def _problems(loaded: LoadedRecipe) -> list[Problem]:
    problems = []
    if loaded.recipe.data.corpus in ("c4", "hub"):
        problems.append(Problem("data.corpus", "streaming from the hub is not in this version", _OWN_TEXT))
    if loaded.recipe.tokenizer.source == "hub":
        problems.append(Problem("tokenizer.source", "tokenizers of the hub are not in this version", _OWN_TOKENIZER))
    return problems
