"""Checkpoints of Hugging Face's form as initial models: read exactly, or refused with the reason (R28, R35)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from blockllm_cli.errors import InputError, RecipeError
from blockllm_cli.hub.link import Link
from blockllm_cli.model.hf_config import architecture, config_json
from blockllm_cli.model.initial import check_agreement, initial_files, with_initial_architecture
from blockllm_cli.model.initial_weights import InitialWeights, equal_to_hashes, tensor_sha256
from blockllm_cli.model.llama import model_of
from blockllm_cli.recipe.sections import Model
from support.hf import random_ids, rewritten, small_config, transformers_logits, written_checkpoint
from support.tiny import equal_tensors

Q = "model.layers.0.self_attn.q_proj.weight"


def opened(folder: Path) -> InitialWeights:
    files = initial_files(str(folder), Link(1.0))
    return InitialWeights(files, files.config())


def error_of(key: str, problem: str, *, fix: str = "") -> RecipeError:
    return RecipeError(f"{key} {problem}; {fix}")


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("tied", [False, True])
def test_one_file_and_many_give_the_same_weights(tmp_path, shard_bytes, tied):
    weights = written_checkpoint(tmp_path, small_config(tie_word_embeddings=tied), shard_bytes=shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard_bytes < 10**9)
    read = opened(tmp_path)
    equal_tensors(dict(read), weights)
    assert list(read) == list(weights)
    assert set(read.file_hashes(lambda: False)) == {path.name for path in tmp_path.glob("*.safetensors")}


def test_a_sharded_checkpoint_keeps_to_the_size_and_says_its_total(tmp_path):
    weights = written_checkpoint(tmp_path, shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * weight.numel() for weight in weights.values())
    assert index["weight_map"].keys() == weights.keys()
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    largest = max(4 * weight.numel() for weight in weights.values())
    assert all((tmp_path / file).stat().st_size < max(20_000, largest) + 2_000 for file in files)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_key_value_heads": 4, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5},
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
    ],
)
def test_logits_are_those_of_transformers_r35(tmp_path, change):
    transformers = pytest.importorskip("transformers")
    config = small_config(**change)
    torch.manual_seed(5)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**vars(config), max_position_embeddings=64, attn_implementation="eager")
    )
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path)
    files = initial_files(str(tmp_path), Link(1.0))
    assert files.config() == config
    weights = InitialWeights(files, config)
    ours = model_of(config, lambda name, _: weights[name])
    ids = random_ids()
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)


def test_a_mistral_without_a_window_is_a_llama(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = small_config()
    fields = {key: value for key, value in vars(config).items() if key != "tie_word_embeddings"}
    transformers.MistralForCausalLM(
        transformers.MistralConfig(**fields, sliding_window=None, max_position_embeddings=64)
    ).save_pretrained(tmp_path)
    weights = opened(tmp_path)
    ids = random_ids()
    with torch.inference_mode():
        ours = model_of(config, lambda name, _: weights[name])(ids)
    torch.testing.assert_close(ours, transformers_logits(tmp_path, ids), rtol=0, atol=1e-5)


def test_config_json_comes_back(tmp_path):
    config = small_config(rope_theta=12_345.0, rms_norm_eps=3e-5, tie_word_embeddings=True, initializer_range=0.5)
    content = config_json(config, dtype="bfloat16", positions=8, bos_id=1, eos_id=2)
    assert architecture(content, "here") == config
    assert content["rope_parameters"] == {"rope_type": "default", "rope_theta": 12_345.0}
    # What transformers takes for granted may be left out.
    bare = {key: content[key] for key in ("model_type", *list(vars(small_config()))[:5])}
    assert architecture(bare, "here") == small_config(num_key_value_heads=4)
    # Version 5 keeps theta in its own table, version 4 beside the sizes.
    assert architecture(bare | {"rope_parameters": {"rope_theta": 7, "rope_type": "default"}}, "").rope_theta == 7.0
    assert architecture(bare | {"rope_theta": 7, "rope_scaling": None}, "").rope_theta == 7.0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; only llama and mistral"),
        ({"model_type": "mistral"}, "sliding_window is 4096"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window is 16"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling is 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is 'linear'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is 'linear'"),  # beside the default
        ({"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, "must be one table for all layers"),
        ({"rope_scaling": 5}, "rope_scaling is 5; it must be one table"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0; it must be a number above 0"),
        ({"initializer_range": float("inf")}, "initializer_range is inf; it must be a number above 0"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan; it must be a number above 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; more than 10,000"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 16}, "head_dim is 16; it must be hidden_size / num_attention_heads, 8"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 5, "head_dim": None}, "num_attention_heads is 5, which does not divide"),
    ],
)
def test_what_this_llama_does_not_compute_is_refused(tmp_path, changed, words):
    written_checkpoint(tmp_path, **changed)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        opened(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({Q.replace(".", "__"): None}, f"lack {Q!r}"),
        ({"model__extra__weight": torch.zeros(2)}, "hold 'model.extra.weight'"),
        ({Q.replace(".", "__"): torch.zeros(32, 31)}, "has shape (32, 31), by its config.json it has (32, 32)"),
        ({Q.replace(".", "__"): torch.zeros(32, 32, dtype=torch.int8)}, "stored as I8; only F32, BF16, F16"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, changed, words):
    written_checkpoint(tmp_path)
    rewritten(tmp_path, **changed)
    with pytest.raises(InputError, match=re.escape(words)):
        opened(tmp_path)


def test_tables_of_old_versions_are_passed_over(tmp_path):
    weights = written_checkpoint(tmp_path)
    rewritten(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    equal_tensors(dict(opened(tmp_path)), weights)


def test_a_tied_head_may_be_stored_too_if_it_is_the_embedding(tmp_path):
    weights = written_checkpoint(tmp_path, small_config(tie_word_embeddings=True))
    rewritten(tmp_path, lm_head__weight=weights["model.embed_tokens.weight"].clone())
    equal_tensors(dict(opened(tmp_path)), weights)
    rewritten(tmp_path, lm_head__weight=weights["model.embed_tokens.weight"] + 1)
    with pytest.raises(InputError, match="is not its embedding"):
        opened(tmp_path)


def test_files_that_can_run_code_are_refused_with_the_way_out(tmp_path):
    written_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="save_pretrained"):
        opened(tmp_path)


def test_an_incomplete_or_odd_folder_is_refused(tmp_path):
    written_checkpoint(tmp_path / "shards", shard_bytes=20_000)
    next((tmp_path / "shards").glob("model-00003*")).unlink()
    with pytest.raises(InputError, match="lacks model-00003-of"):
        opened(tmp_path / "shards")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {Q: "../../elsewhere.safetensors"}}))
    with pytest.raises(InputError, match="elsewhere"):
        opened(tmp_path / "shards")
    index.write_text("[]")
    with pytest.raises(InputError, match="JSON object"):
        opened(tmp_path / "shards")
    (tmp_path / "shards" / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        opened(tmp_path / "shards")
    with pytest.raises(InputError, match="is a file"):
        initial_files(str(index), Link(1.0))
    for name in ("no/such/folder", "nowhere", "./owner/name"):
        with pytest.raises(InputError, match="there is no folder"):
            initial_files(name, Link(1.0))
    assert initial_files("owner/name@main", Link(1.0)).folder is None


def test_the_recipe_takes_the_architecture_and_must_agree(tmp_path):
    written_checkpoint(tmp_path)
    filled = with_initial_architecture(Model(init=str(tmp_path), hidden_size=32), error_of)
    assert {name: getattr(filled, name) for name in vars(small_config())} == vars(small_config())
    with pytest.raises(RecipeError, match=r"model\.hidden_size is 64, and that of model\.init \(.*\) is 32"):
        with_initial_architecture(Model(init=str(tmp_path), hidden_size=64), error_of)
    with pytest.raises(RecipeError, match=r"model\.size is '9m', whose hidden_size is 128, .* is 32"):
        with_initial_architecture(Model(init=str(tmp_path), size="9m"), error_of)
    assert with_initial_architecture(Model(hidden_size=8), error_of) == Model(hidden_size=8)
    # All fields given, as in the recipe of a run: the checkpoint is not read.
    (tmp_path / "config.json").unlink()
    assert with_initial_architecture(filled, error_of) is filled
    with pytest.raises(RecipeError, match=r"model\.rope_theta is 10000\.0, and .* is 7\.0"):
        check_agreement(filled, small_config(rope_theta=7.0), error_of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hashes_tell_equal_values_from_others(dtype):
    model = torch.nn.Linear(3, 2).to(dtype)
    hashes = {name: tensor_sha256(parameter) for name, parameter in model.named_parameters()}
    assert equal_to_hashes(model, ["weight", "bias"], hashes) == ["weight", "bias"]
    with torch.no_grad():
        model.bias[1] += 0.5
    assert equal_to_hashes(model, ["weight", "bias"], hashes) == ["weight"]
    assert tensor_sha256(torch.ones(3, 2).T) == tensor_sha256(torch.ones(2, 3))
