"""The shape of a Llama: field names as in Hugging Face's `LlamaConfig`, and the published sizes. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from blockllm_cli.errors import RecipeError

if TYPE_CHECKING:
    from blockllm_cli.recipe.sections import Model

VOCAB_MULTIPLE = 64
"""A vocabulary that the recipe leaves out is the tokenizer's, rounded up to a multiple of this."""


def _size(hidden: int, intermediate: int, heads: int, layers: int) -> Mapping[str, int]:
    return MappingProxyType(
        {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
        }
    )


SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "9m": _size(128, 352, 4, 4),
        "20m": _size(256, 688, 4, 4),
        "35m": _size(384, 1024, 8, 6),
        "60m": _size(512, 1376, 8, 8),
        "71m": _size(512, 1368, 8, 12),
        "130m": _size(768, 2048, 12, 12),
        "250m": _size(768, 2560, 16, 24),
        "350m": _size(1024, 2736, 16, 24),
        "1b": _size(2048, 5461, 32, 24),  # 5461 is odd: slow on tensor cores, kept because every published table has it
        "3b": _size(2560, 6848, 32, 32),
        "7b": _size(4096, 11008, 32, 32),
    }
)
"""Values of `model.size`: the configurations of the GaLore repository and its descendants (no grouped queries)."""


class _Fault(NamedTuple):
    key: str
    problem: str
    fix: str


class ErrorFactory(Protocol):
    """Makes the error for a key of the recipe; `LoadedRecipe.error` adds file, line and value."""

    def __call__(self, key: str, problem: str, *, fix: str = "") -> RecipeError:
        """The error to raise for the dotted `key`."""


def _plain_error(key: str, problem: str, *, fix: str = "") -> RecipeError:
    return RecipeError(f"{key} {problem}" + (f"; {fix}" if fix else ""))


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Architecture of one model.

    Attributes:
        vocab_size: rows of the embedding and of the head.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads; their width is `head_dim`.
        num_key_value_heads: key and value heads, each shared by an equal number of query heads.
        rope_theta: base of the rotary wavelengths.
        rms_norm_eps: added to the mean square inside the square root.
        tie_word_embeddings: whether the head is the embedding.
        initializer_range: standard deviation of the initial matrices.

    Raises:
        ValueError: the sizes do not fit together; the message names the field.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        fault = next(_faults(vars(self)), None)
        if fault is not None:
            raise ValueError(f"{fault.key} {fault.problem}; {fault.fix}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by its Hugging Face name, in module order; a tied head does not appear."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        key_value = self.num_key_value_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key_value, hidden),
            "self_attn.v_proj": (key_value, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for index in range(self.num_hidden_layers):
            shapes.update({f"model.layers.{index}.{part}.weight": shape for part, shape in layer.items()})
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters; a tied head counts once."""
        return sum(prod(shape) for shape in self.parameter_shapes().values())


def llama_config(model: Model, *, tokenizer_vocab_size: int, error: ErrorFactory = _plain_error) -> LlamaConfig:
    """The architecture that the recipe's `[model]` table describes.

    Args:
        model: the table; fields given beside `size` override those of the size.
        tokenizer_vocab_size: pieces of the tokenizer; stands in for an absent `vocab_size`, rounded up to a multiple
            of 64.
        error: makes the error for a key; pass `LoadedRecipe.error` to have file and line in it.

    Raises:
        RecipeError: a field is missing, the sizes do not fit together, or the tokenizer has more pieces than the
            model has rows.
    """
    values: dict[str, Any] = dict(_published(model.size, error))
    for name in LlamaConfig.__dataclass_fields__:
        given = getattr(model, name)
        if given is not None:
            values[name] = given
    if "vocab_size" not in values:
        values["vocab_size"] = -(-tokenizer_vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
        if name not in values:
            raise error(f"model.{name}", "is missing", fix=f"give it, or a size ({', '.join(SIZES)}) that has it")
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    for fault in _faults(values):
        raise error(f"model.{fault.key}", fault.problem, fix=fault.fix)
    if values["vocab_size"] < tokenizer_vocab_size:
        raise error(
            "model.vocab_size",
            f"is {values['vocab_size']}, but the tokenizer has {tokenizer_vocab_size} pieces",
            fix=f"raise it to at least {tokenizer_vocab_size}, or leave it out"
            if model.init is None
            else f"the rows are those of model.init ({model.init}): use the tokenizer that it was trained with",
        )
    return LlamaConfig(**values)


def _published(size: str | None, error: ErrorFactory) -> Mapping[str, int]:
    if size is None:
        return {}
    if size not in SIZES:
        raise error("model.size", f"is {size!r}, which is no known size", fix=f"use one of {', '.join(SIZES)}")
    return SIZES[size]


def _faults(values: Mapping[str, Any]) -> Iterator[_Fault]:
    """What is wrong with the sizes, most basic first; later checks rely on earlier ones having passed."""
    counts = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    for key in (*counts, "num_attention_heads", "num_key_value_heads"):
        if values[key] < 1:
            yield _Fault(key, f"is {values[key]}", "it must be at least 1")
    hidden, heads, key_value_heads = (
        values[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    if hidden % heads:
        yield _Fault(
            "num_attention_heads",
            f"is {heads}, which does not divide hidden_size {hidden}",
            "every head has hidden_size / num_attention_heads channels; change one of the two",
        )
    if hidden // heads % 2:
        yield _Fault(
            "num_attention_heads",
            f"is {heads}, which gives heads of {hidden // heads} channels (hidden_size {hidden})",
            "rotary embeddings turn channels in pairs, so hidden_size / num_attention_heads must be even",
        )
    if heads % key_value_heads:
        yield _Fault(
            "num_key_value_heads",
            f"is {key_value_heads}, which does not divide num_attention_heads {heads}",
            "every key and value head serves an equal number of query heads; change one of the two",
        )
