from __future__ import annotations

import pytest

from blockllm_cli.errors import RecipeError
from blockllm_cli.model.config import SIZES, LlamaConfig, llama_config
from blockllm_cli.recipe.sections import Model

# Parameters in millions with an untied head of 32,000 rows, as the literature's configurations give them, and how many
# of them are in matrices of attention and MLP.
PUBLISHED = {
    "60m": (58.07, 25.30, 56),
    "130m": (134.11, 84.93, 84),
    "350m": (367.97, 302.38, 168),
    "1b": (1339.08, 1207.91, 168),
    "7b": (6738.42, 6476.01, 224),
}
TINY = {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize(("size", "expected"), PUBLISHED.items())
def test_sizes_have_the_published_numbers_of_parameters(size, expected):
    config = llama_config(Model(size=size), tokenizer_vocab_size=32000)
    matrices = [shape for name, shape in config.parameter_shapes().items() if ".layers." in name and "norm" not in name]
    elements = sum(rows * columns for rows, columns in matrices)
    assert (round(config.num_parameters / 1e6, 2), round(elements / 1e6, 2), len(matrices)) == expected


def test_every_size_has_its_widths():
    widths = {name: tuple(size.values()) for name, size in SIZES.items()}
    assert widths == {
        "9m": (128, 352, 4, 4),
        "20m": (256, 688, 4, 4),
        "35m": (384, 1024, 8, 6),
        "60m": (512, 1376, 8, 8),
        "71m": (512, 1368, 8, 12),
        "130m": (768, 2048, 12, 12),
        "250m": (768, 2560, 16, 24),
        "350m": (1024, 2736, 16, 24),
        "1b": (2048, 5461, 32, 24),
        "3b": (2560, 6848, 32, 32),
        "7b": (4096, 11008, 32, 32),
    }


def test_fields_beside_a_size_override_it():
    model = Model(size="60m", num_key_value_heads=2, rope_theta=5e5, tie_word_embeddings=True, vocab_size=640)
    config = llama_config(model, tokenizer_vocab_size=500)
    assert config == LlamaConfig(
        vocab_size=640,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        rope_theta=5e5,
        tie_word_embeddings=True,
    )
    assert "lm_head.weight" not in config.parameter_shapes()
    assert config.parameter_shapes()["model.layers.7.self_attn.k_proj.weight"] == (128, 512)


@pytest.mark.parametrize(("pieces", "rows"), [(300, 320), (320, 320), (321, 384), (1, 64)])
def test_an_absent_vocabulary_is_the_tokenizers_rounded_up(pieces, rows):
    assert llama_config(Model(**TINY), tokenizer_vocab_size=pieces).vocab_size == rows


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_with_both_numbers():
    """R28: 300 pieces do not fit 256 rows, and fit 320."""
    assert llama_config(Model(**TINY, vocab_size=320), tokenizer_vocab_size=300).vocab_size == 320
    with pytest.raises(RecipeError, match=r"model\.vocab_size is 256, but the tokenizer has 300 pieces"):
        llama_config(Model(**TINY, vocab_size=256), tokenizer_vocab_size=300)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_attention_heads": 5}, r"model\.num_attention_heads is 5, which does not divide hidden_size 32"),
        ({"num_attention_heads": 32}, r"heads of 1 channels"),
        ({"num_key_value_heads": 3}, r"model\.num_key_value_heads is 3, which does not divide num_attention_heads 4"),
        ({"hidden_size": None}, r"model\.hidden_size is missing; give it, or a size \(9m, "),
        ({"size": "61m"}, r"model\.size is '61m'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_key(change, text):
    with pytest.raises(RecipeError, match=text):
        llama_config(Model(**(TINY | change)), tokenizer_vocab_size=64)


def test_errors_are_made_by_the_given_factory():
    seen = []

    def error(key, problem, *, fix=""):
        seen.append(key)
        return RecipeError(f"line 7: {key} {problem}")

    with pytest.raises(RecipeError, match="line 7"):
        llama_config(Model(**TINY, vocab_size=8), tokenizer_vocab_size=64, error=error)
    assert seen == ["model.vocab_size"]


def test_the_config_itself_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="num_attention_heads is 3"):
        LlamaConfig(**(TINY | {"num_attention_heads": 3}), num_key_value_heads=3, vocab_size=64)
    with pytest.raises(ValueError, match="num_hidden_layers is 0"):
        LlamaConfig(**(TINY | {"num_hidden_layers": 0}), num_key_value_heads=4, vocab_size=64)
