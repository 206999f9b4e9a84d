from __future__ import annotations

import pytest
import torch

from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.generation import generate
from blockllm_cli.model.llama import build_model

PROMPT = [1, 5, 9, 33]


@pytest.fixture(params=[4, 2], ids=["all heads", "grouped heads"])
def model(request):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=request.param,
        initializer_range=0.3,
    )
    return build_model(config, seed=3)


def recomputed(model, count, pick):
    ids = list(PROMPT)
    for _ in range(count):
        with torch.no_grad():
            ids.append(pick(model(torch.tensor([ids]))[0, -1]))
    return ids[len(PROMPT) :]


def test_greedy_text_is_that_of_full_recomputation(model):
    expected = recomputed(model, 20, lambda logits: int(logits.argmax()))
    assert len(set(expected)) > 3
    assert generate(model, PROMPT, max_new_tokens=20, temperature=0) == expected


def test_sampled_text_is_that_of_full_recomputation(model):
    draws = torch.Generator().manual_seed(4)

    def pick(logits):
        kept = logits.topk(5)
        return int(kept.indices[torch.multinomial((kept.values / 0.8).softmax(-1), 1, generator=draws)])

    expected = recomputed(model, 20, pick)
    drawn = generate(
        model, PROMPT, max_new_tokens=20, temperature=0.8, top_k=5, generator=torch.Generator().manual_seed(4)
    )
    assert drawn == expected


def test_it_stops_before_the_stop_id(model):
    free = generate(model, PROMPT, max_new_tokens=20, temperature=0)
    place = next(i for i in range(2, 20) if free[i] not in free[:i])
    assert generate(model, PROMPT, max_new_tokens=20, temperature=0, stop_id=free[place]) == free[:place]


def test_the_likeliest_of_one_is_greedy(model):
    greedy = generate(model, PROMPT, max_new_tokens=8, temperature=0)
    assert generate(model, PROMPT, max_new_tokens=8, temperature=5.0, top_k=1) == greedy


def test_bf16_continues_too(model):
    assert len(generate(model.bfloat16(), PROMPT, max_new_tokens=5, temperature=0)) == 5


@pytest.mark.parametrize(
    ("change", "text"),
    [({"prompt_ids": []}, "no token"), ({"temperature": -1.0}, "temperature is -1"), ({"top_k": 0}, "top_k is 0")],
)
def test_settings_out_of_range_are_refused(model, change, text):
    with pytest.raises(ValueError, match=text):
        generate(model, **({"prompt_ids": PROMPT, "max_new_tokens": 1} | change))
