"""README.md of an exported model: what it is, the numbers of its run, what it was made from, whose it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blockllm_cli import __version__
from blockllm_cli.methods.resolve import Resolved
from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.units import format_count

_NUMBERS = (
    ("perplexity", "validation perplexity"),
    ("loss", "validation loss, nats per token"),
    ("perplexity_legacy", "perplexity as the literature computes it"),
    ("unigram_perplexity", "perplexity of a unigram model"),
    ("tokens", "target tokens seen"),
    ("steps", "updates"),
    ("seed", "seed"),
)
_HASHES = (
    ("train_rows_sha256", "rows it was trained on, in order"),
    ("validation_sha256", "validation rows"),
    ("tokenizer_sha256", "tokenizer"),
    ("recipe_sha256", "recipe"),
)


@dataclass(frozen=True)
class Card:
    """What the model card is made from.

    Attributes:
        resolved: the run's recipe.
        recipe_text: recipe.toml of the run.
        config: the architecture.
        step: update whose weights are exported.
        dtype: of the stored weights, such as "bf16".
        summary: summary.json of the run, if it has one.
        opening: whether rows began with a token of their own.
    """

    resolved: Resolved
    recipe_text: str
    config: LlamaConfig
    step: int
    dtype: str
    summary: dict[str, Any] | None
    opening: bool

    def text(self) -> str:
        """The page, as Markdown with the header that the hub reads."""
        recipe = self.resolved.recipe
        parts = [
            "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- blockllm\n---\n",
            f"# {recipe.run.name}\n",
            f"A Llama of {format_count(self.config.num_parameters)} parameters, pretrained with the method "
            f"`{recipe.method['name']}` by blockllm {__version__}. These are the weights after update {self.step}, "
            f"stored in {self.dtype}.\n",
            "```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
            "```\n",
            self._use(),
            "## Numbers\n",
            self._numbers(),
            "## Made from\n",
            self._origin(),
            "## Licence\n",
            self._licence(),
            "## Recipe\n",
            "As it was resolved; `blockllm pretrain` takes it.\n",
            f"````toml\n{self.recipe_text.strip()}\n````\n",
        ]
        return "\n".join(parts)

    def _licence(self) -> str:
        init = self.resolved.recipe.model.init
        return (
            "The licence of these weights is for whoever trained them to give: it depends on the texts they read"
            + (f" and on the model that training began with (`{init}`)" if init else "")
            + ". The program that trained them, blockllm, is under Apache-2.0, which says nothing about the weights.\n"
        )

    def _use(self) -> str:
        length = self.resolved.recipe.data.sequence_length
        first = (
            "Texts began with the token that the tokenizer puts before them."
            if self.opening
            else "Texts began without a token of their own, so the tokenizer puts none before them."
        )
        return f"Training rows had {length} positions. {first} It is a model of text, and follows no instructions.\n"

    def _numbers(self) -> str:
        summary = self.summary
        if summary is None or summary["steps"] != self.step:
            return "The run has no summary of this update; `blockllm evaluate RUN --step` computes its perplexity.\n"
        return _table([(words, _number(summary.get(key))) for key, words in _NUMBERS])

    def _origin(self) -> str:
        data, summary = self.resolved.recipe.data, self.summary or {}
        rows = [("corpus", f"`{data.corpus}`")]
        rows += [("files", ", ".join(f"`{glob}`" for glob in data.train))] if data.train else []
        rows += [(f"{words} (sha256)", f"`{summary[key]}`") for key, words in _HASHES if summary.get(key)]
        if init := summary.get("init"):
            rows.append(("initial weights", f"`{init['name']}`"))
            rows += [(f"initial {name} (sha256)", f"`{digest}`") for name, digest in init["files"].items()]
        versions = summary.get("versions") or {}
        rows += [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))] if versions else []
        return _table(rows)


def _table(rows: list[tuple[str, str]]) -> str:
    lines = ["| | |", "|---|---|", *(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows)]
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
