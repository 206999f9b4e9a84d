"""`run.compile`: the numbers, names and files of a run without it (R14, R19)."""

from functools import partialmethod

import pytest

from blockllm_cli.errors import RecipeError
from blockllm_cli.model.llama import LlamaForCausalLM
from blockllm_cli.runner import pretrain
from support.tiny import equal_tensors

LAYER = "run.compile=layer"
SHORT = ("schedule.steps=8", "schedule.warmup=2", "evaluate.every=4", "evaluate.tokens=200")
METHOD = 'blockllm:patience=2,max_interval=2,always=["head"],sparsity=0.9,score=random'


@pytest.fixture
def without_inductor(monkeypatch):
    """All of the compiler but the generated code, which takes most of the time."""
    monkeypatch.setattr(LlamaForCausalLM, "compile_layers", partialmethod(LlamaForCausalLM.compile_layers, "aot_eager"))
    monkeypatch.setattr(pretrain, "check_compiler", lambda device: None)


def assert_close(made, plain, key, tolerance=1e-6):
    for one, other in zip(made.column(key), plain.column(key), strict=True):
        assert abs(one - other) <= tolerance * abs(other), key


def names(result):
    """Of the blocks of each selection."""
    return [[block["name"] for block in event["blocks"]] for event in result.events if event["kind"] == "selection"]


@pytest.mark.parametrize("options", ["", ",inactive=normalized"])
def test_selections_do_not_compile_anew(tiny, without_inductor, options):
    """R19: the embedding is a candidate, never selected."""
    method = METHOD + options
    plain, compiled = tiny.run(*SHORT, method=method), tiny.run(*SHORT, LAYER, method=method)
    assert len(names(compiled)) >= 3
    assert names(compiled) == names(plain)
    assert not any("embed_tokens" in name for taken in names(compiled) for name in taken)
    for key in ("train/loss", "train/gradient_norm", "eval/loss"):
        assert_close(compiled, plain, key)
    told = [event for event in compiled.events if event["kind"] == "compilation"]
    assert 1 <= len(told) == compiled.summary["compilations"] <= 4
    assert plain.summary["compilations"] is None
    assert compiled.output.count("compiled a decoder layer for") == len(told)


def test_checkpoints_have_the_same_names_and_evaluate_without(tiny, without_inductor):
    """R14; and a resume may change the switch, which it says."""
    compiled, plain = tiny.run(*SHORT, LAYER, stop_after=4), tiny.run(*SHORT, stop_after=4)
    for file in ("weights", "method"):
        assert list(compiled.tensors(file)) == list(plain.tensors(file))
    uncompiled = tiny.run(*SHORT, resume=compiled.folder)
    assert "run.compile was 'layer', now 'off': from here on the run is not bit-equal" in uncompiled.output
    assert uncompiled.summary["compilations"] is None
    assert_close(uncompiled, tiny.run(*SHORT), "eval/perplexity")


def test_a_resume_with_compiled_layers_is_exact(tiny, without_inductor):
    whole, cut = tiny.run(*SHORT, LAYER), tiny.run(*SHORT, LAYER, stop_after=3)
    resumed = tiny.run(*SHORT, LAYER, resume=cut.folder)
    for file in ("weights", "method"):
        equal_tensors(resumed.tensors(file), whole.tensors(file))


def test_a_missing_compiler_ends_the_run_before_it_begins(tiny, monkeypatch):
    def refuse(device):
        raise RecipeError("no compiler")

    monkeypatch.setattr(pretrain, "check_compiler", refuse)
    with pytest.raises(RecipeError, match="no compiler"):
        tiny.run(*SHORT, LAYER)
    assert not (tiny.folder / "runs").exists()
