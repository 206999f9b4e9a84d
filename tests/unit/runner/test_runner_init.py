"""Runs that begin with a checkpoint (`model.init`): same numbers, same rules for resume, and what is remembered."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from blockllm_cli.app import main
from blockllm_cli.durable import file_sha256
from blockllm_cli.errors import InputError, RecipeError
from blockllm_cli.runner.export import ExportRequest, export_run
from blockllm_cli.runner.finished import evaluate_run, generate_text, opened_run
from blockllm_cli.tracking.terminal import Terminal
from support.hf import rewritten, small_config, written_checkpoint
from support.tiny import equal_rows, equal_tensors

SHORT = ("schedule.steps=6", "schedule.warmup=0", "evaluate.every=3")
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@pytest.fixture
def begun(tiny, tmp_path):
    """A recipe whose model is nothing but the checkpoint in the folder that is given beside it."""
    text = tiny.recipe.read_text()
    for field in SHAPE:
        text = "\n".join(line for line in text.splitlines() if not line.startswith(f"{field} ="))
    folder = tmp_path / "checkpoint"
    tiny.recipe.write_text(text.replace("[model]", f'[model]\ninit = "{folder}"'))
    return tiny, folder


def test_an_export_goes_on_where_its_run_ended_r35(tiny, tmp_path):
    first = tiny.run(*SHORT)
    with Terminal() as terminal:
        export_run(ExportRequest(first.folder, tmp_path / "model"), terminal)
    second = tiny.run(*SHORT, f"model.init={tmp_path / 'model'}", "run.name=second")
    assert second.column("eval/perplexity")[0] == first.summary["perplexity"]
    assert second.summary["validation_sha256"] == first.summary["validation_sha256"]
    assert "note: the tokenizer" not in second.output
    init = second.summary["init"]
    assert init["name"] == str(tmp_path / "model")
    assert init["files"]["model.safetensors"] == file_sha256(tmp_path / "model" / "model.safetensors")
    assert json.loads((second.folder / "init.json").read_text())["files"] == init["files"]
    assert first.summary["init"] is None
    assert not (first.folder / "init.json").exists()


def test_the_architecture_comes_from_the_checkpoint_and_stays_in_the_recipe(begun):
    tiny, folder = begun
    weights = written_checkpoint(folder, small_config(rope_theta=777.0, tie_word_embeddings=True))
    run = tiny.run(*SHORT, "schedule.learning_rate=1e-30", "method.weight_decay=0")
    text = (run.folder / "recipe.toml").read_text()
    assert f"rope_theta = 777.0 # from model.init, {folder}" in text
    assert "num_key_value_heads = 2" in text
    # A rate of almost nothing moves almost nothing: these are the weights of the checkpoint.
    for name, tensor in run.tensors().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-20)
    assert run.summary["parameters"] == small_config(tie_word_embeddings=True).num_parameters


def test_a_resume_needs_the_checkpoint_no_more(begun):
    tiny, folder = begun
    written_checkpoint(folder)
    whole = tiny.run(*SHORT)
    cut = tiny.run(*SHORT, stop_after=2)
    shutil.rmtree(folder)
    from blockllm_cli.runner.pretrain import PretrainRequest, pretrain

    with Terminal() as terminal:
        again = pretrain(PretrainRequest(None, resume=str(cut.folder)), terminal)
    assert again == cut.folder
    equal_rows(cut.metrics, whole.metrics)
    equal_tensors(cut.tensors(), whole.tensors())
    assert cut.summary["unmoved"] == whole.summary["unmoved"] == []
    assert cut.summary["init"] == whole.summary["init"]
    with Terminal() as terminal:
        _, evaluation, _ = evaluate_run(cut.folder, step=None, overrides=[], terminal=terminal)
    assert evaluation.perplexity == whole.summary["perplexity"]
    with opened_run(cut.folder, step=None) as opened:
        assert generate_text(opened, "The", max_new_tokens=3, temperature=0, top_k=None, seed=0).startswith("The")


def test_unmoved_means_as_the_checkpoint_was(begun):
    tiny, folder = begun
    written_checkpoint(folder)
    frozen = ("method.sparsity=0.99", "method.max_interval=1000")
    run = tiny.run(*SHORT, "run.precision=bf16", *frozen, method="blockllm")
    unmoved = run.summary["unmoved"]
    assert unmoved
    begun_with = json.loads((run.folder / "init.json").read_text())["tensors"]
    assert begun_with.keys() == run.tensors().keys()
    from blockllm_cli.model.initial_weights import tensor_sha256

    for name, tensor in run.tensors().items():
        assert (tensor_sha256(tensor) == begun_with[name]) == (name in unmoved), name
    assert "still have the values they began with" in run.output


def test_a_run_without_a_checkpoint_of_its_own_yet_begins_anew_with_the_same_one(begun):
    tiny, folder = begun
    written_checkpoint(folder)
    whole = tiny.run(*SHORT)
    cut = tiny.run(*SHORT, stop_after=2)
    shutil.rmtree(cut.folder / "checkpoints")
    again = tiny.run(*SHORT, resume=cut.folder)
    equal_tensors(again.tensors(), whole.tensors())
    cut = tiny.run(*SHORT, stop_after=2)
    shutil.rmtree(cut.folder / "checkpoints")
    written_checkpoint(folder, initializer_range=0.02, use_cache=False)
    with pytest.raises(InputError, match=r"is not what the run in .* began with"):
        tiny.run(*SHORT, resume=cut.folder)


def test_another_dtype_is_converted(begun):
    tiny, folder = begun
    weights = written_checkpoint(folder, dtype=torch.bfloat16)
    run = tiny.run(*SHORT, "schedule.learning_rate=1e-30")
    for name, tensor in run.tensors().items():
        torch.testing.assert_close(tensor, weights[name].float(), rtol=0, atol=1e-20)
    papers = tiny.run(*SHORT, "run.precision=bf16", "schedule.learning_rate=1e-30")
    equal_tensors(papers.tensors(), weights)


def test_weights_that_are_not_finite_are_refused_by_name(begun):
    """Not as a divergence of the first update, whose advice is about the learning rate."""
    tiny, folder = begun
    weights = written_checkpoint(folder)
    rewritten(folder, model__norm__weight=torch.full_like(weights["model.norm.weight"], torch.nan))
    with pytest.raises(InputError, match=r"'model\.norm\.weight' in .* not finite in torch\.float32"):
        tiny.run(*SHORT)


def test_a_recipe_that_says_otherwise_is_refused_before_anything_is_made(begun):
    tiny, folder = begun
    written_checkpoint(folder)
    with pytest.raises(RecipeError, match=r"--set model\.hidden_size=64.*is 64, and that of model\.init \(.*\) is 32"):
        tiny.run("model.hidden_size=64")
    # The recipe of a run gives every field, and its checkpoint may be another one by now.
    first = tiny.run(*SHORT)
    written_checkpoint(folder, small_config(rope_theta=5.0))
    assert main(["pretrain", str(first.folder / "recipe.toml")]) == 2
    with pytest.raises(InputError, match="there is no folder nowhere/at/all"):
        tiny.run("model.init=nowhere/at/all")
    assert len(list((tiny.folder / "runs" / "tiny").iterdir())) == 1


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_r28(begun):
    tiny, folder = begun
    written_checkpoint(folder, small_config(vocab_size=256))
    with pytest.raises(RecipeError, match=r"256.*300 pieces; the rows are those of model\.init"):
        tiny.run(*SHORT)


def test_another_tokenizer_beside_the_weights_is_noted(begun):
    from blockllm_cli.data.tokenizer_training import draw_sample, train_tokenizer

    tiny, folder = begun
    written_checkpoint(folder)
    shutil.copy(tiny.tokenizer, folder / "tokenizer.model")
    assert "note: the tokenizer" not in tiny.run(*SHORT).output
    sample = draw_sample(["other words entirely"] * 9, sample_bytes=999, seed=0)
    other = train_tokenizer(sample, vocab_size=270, kind="bpe")
    (folder / "tokenizer.model").write_bytes(other.model_bytes)
    assert "note: the tokenizer of this run is not the one beside the initial model" in tiny.run(*SHORT).output


def test_validate_shows_where_the_architecture_comes_from(begun, capsys):
    tiny, folder = begun
    written_checkpoint(folder)
    assert main(["validate", str(tiny.recipe), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["recipe"]["model"]["hidden_size"] == 32
    assert report["origins"]["model.hidden_size"] == f"from model.init, {folder}"
    assert report["parameters"]["total"] == small_config().num_parameters
