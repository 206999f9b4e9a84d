"""A polite stop at any moment loses nothing (R11). The signal is real, sent by the process to itself."""

import os
import signal

import pytest

from blockllm_cli.errors import InterruptedRunError
from support.striking import strike_at
from support.tiny import equal_rows, equal_tensors


@pytest.fixture
def model_class():
    from blockllm_cli.model.llama import LlamaForCausalLM

    return LlamaForCausalLM


SETS = ("batch.micro_rows=2", "evaluate.rows=2")


# Loss is called 4 times an update; evaluation runs at 0, 10 and 20, about 15 batches each.
@pytest.mark.parametrize(
    ("name", "call", "number"),
    [
        ("loss", 4 * 6 + 1, signal.SIGTERM),
        ("loss", 4 * 6 + 3, signal.SIGINT),
        ("loss", 1, signal.SIGTERM),
        ("row_nll", 3, signal.SIGTERM),
        ("row_nll", 20, signal.SIGINT),
    ],
    ids=["begin of an update", "middle of an update", "first update", "evaluation at start", "evaluation later"],
)
def test_stop_and_resume_is_the_unbroken_run(tiny, monkeypatch, model_class, name, call, number):
    whole = tiny.run(*SETS)
    with monkeypatch.context() as patch, pytest.raises(InterruptedRunError) as caught:
        strike_at(patch, model_class, name, call, number)
        tiny.run(*SETS)
    assert caught.value.status == 128 + number
    assert "blockllm pretrain --resume" in str(caught.value)
    cut = tiny.newest()
    assert cut.summary["status"] == "stopped"
    assert cut.summary["exit_code"] == 128 + number
    resumed = tiny.run(*SETS, resume=cut.folder)
    assert resumed.summary["status"] == "completed"
    equal_rows(whole.metrics, resumed.metrics)
    equal_tensors(whole.tensors(), resumed.tensors())
    assert whole.rows == resumed.rows


def test_a_stop_in_the_last_evaluation(tiny, monkeypatch, model_class):
    whole = tiny.run(*SETS)
    batches = 0
    real = model_class.row_nll

    def counting(self, batch):
        nonlocal batches
        batches += 1
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(model_class, "row_nll", counting)
        tiny.run(*SETS)
    with monkeypatch.context() as patch, pytest.raises(InterruptedRunError):
        strike_at(patch, model_class, "row_nll", batches - 1)
        tiny.run(*SETS)
    cut = tiny.newest()
    assert cut.metrics[-1]["step"] == 19
    resumed = tiny.run(*SETS, resume=cut.folder)
    equal_rows(whole.metrics, resumed.metrics)
    assert resumed.summary["perplexity"] == whole.summary["perplexity"]


def test_a_stop_while_the_tokenizer_is_trained_leaves_nothing(tiny, monkeypatch):
    from blockllm_cli.data.corpus import Corpus

    real = Corpus.texts

    def striking(self, *arguments):
        for number, text in enumerate(real(self, *arguments)):
            if number == 30:
                os.kill(os.getpid(), signal.SIGINT)
            yield text

    monkeypatch.setattr(Corpus, "texts", striking)
    recipe = tiny.recipe.read_text()
    start, end = recipe.index("[tokenizer]"), recipe.index("[data]")
    tiny.recipe.write_text(recipe[:start] + '[tokenizer]\nsource = "train"\nvocab_size = 300\n\n' + recipe[end:])
    with pytest.raises(InterruptedRunError, match="nothing was written; run the same command again") as caught:
        tiny.run()
    assert caught.value.status == 130
    assert not (tiny.folder / "runs").exists()


def test_a_stop_while_the_validation_set_is_made_leaves_nothing(tiny, monkeypatch):
    from blockllm_cli.runner import inputs

    strike_at(monkeypatch, inputs, "validation_rows", 1)
    with pytest.raises(InterruptedRunError, match="nothing was written"):
        tiny.run()
    assert not (tiny.folder / "runs").exists()
