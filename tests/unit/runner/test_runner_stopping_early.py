"""A polite stop while inputs are prepared, while a checkpoint is written, and in `evaluate` (R11)."""

import os
import signal
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from blockllm_cli.errors import InterruptedRunError
from blockllm_cli.tracking.terminal import Terminal
from support.striking import strike_at
from support.tiny import equal_rows, equal_tensors


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def train_own_tokenizer(tiny) -> None:
    recipe = tiny.recipe.read_text()
    start, end = recipe.index("[tokenizer]"), recipe.index("[data]")
    tiny.recipe.write_text(recipe[:start] + '[tokenizer]\nsource = "train"\nvocab_size = 300\n\n' + recipe[end:])


def test_a_stop_while_the_builtin_corpus_is_read_leaves_nothing(tiny, monkeypatch, tmp_path):
    from blockllm_cli.data import builtin

    sources = tmp_path / "sources"
    sources.mkdir()
    paragraph = "A sentence of plain words that goes on for a while and is long enough for a paragraph of this corpus."
    for number in range(40):
        (sources / f"m{number}.py").write_text(f'"""Number {"x" * number}. {paragraph}"""\n')
    monkeypatch.setattr(builtin, "installed_sources", lambda: [builtin.Source("python", "1", sources)])
    lines = tiny.recipe.read_text().replace('corpus = "files"', f'corpus = "builtin"\ncache = "{tmp_path}/cache"')
    tiny.recipe.write_text("\n".join(x for x in lines.split("\n") if not x.startswith(("train =", "validation ="))))
    before = {path.name for path in tmp_path.iterdir()}
    strike_at(monkeypatch, builtin, "_documentation", 20, signal.SIGINT)
    with pytest.raises(InterruptedRunError, match="nothing was written; run the same command again") as caught:
        tiny.run()
    assert caught.value.status == 130
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_stop_while_sentencepiece_trains_leaves_no_process_and_no_file(tiny, monkeypatch, tmp_path):
    train_own_tokenizer(tiny)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    started = []
    real = subprocess.Popen.__init__

    def starting(process, *arguments, **keywords):
        real(process, *arguments, **keywords)
        started.append(process.pid)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess.Popen, "__init__", starting)
    with pytest.raises(InterruptedRunError, match="nothing was written; run the same command again") as caught:
        tiny.run()
    assert caught.value.status == 143
    assert len(started) == 1
    assert not psutil.pid_exists(started[0])
    assert not list((tmp_path / "temporary").iterdir())
    assert not (tiny.folder / "runs").exists()


def test_a_stop_in_the_middle_of_the_validation_set_leaves_nothing(tiny, monkeypatch):
    from blockllm_cli.data import blocks
    from blockllm_cli.data.tokenizer import Tokenizer

    monkeypatch.setattr(blocks, "_ENCODED_AT_ONCE", 1)
    strike_at(monkeypatch, Tokenizer, "encode", 4, signal.SIGINT)
    encoded = []
    real = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, texts: encoded.append(texts) or real(self, texts))
    with pytest.raises(InterruptedRunError, match="nothing was written") as caught:
        tiny.run("evaluate.tokens=3000")
    assert caught.value.status == 130
    assert len(encoded) == 4
    assert not (tiny.folder / "runs").exists()


def test_a_stop_while_a_resume_is_prepared_leaves_the_run_as_it_was(tiny, monkeypatch):
    from blockllm_cli.runner import inputs

    whole = tiny.run()
    cut = tiny.run(stop_after=10)
    before = content(cut.folder)
    with monkeypatch.context() as patch, pytest.raises(InterruptedRunError) as caught:
        strike_at(patch, inputs, "validation_rows", 1, signal.SIGTERM)
        tiny.run(resume=cut.folder)
    assert "its folder is as it was" in str(caught.value)
    assert str(caught.value).endswith(f"continue with: blockllm pretrain --resume {cut.folder}")
    assert content(cut.folder) == before
    resumed = tiny.run(resume=cut.folder)
    equal_rows(whole.metrics, resumed.metrics)
    equal_tensors(whole.tensors(), resumed.tensors())


@pytest.mark.parametrize("call", [1, 2, 3], ids=["weights of update 5", "state of update 5", "weights of update 10"])
def test_a_stop_while_a_checkpoint_is_written_finishes_it_and_goes_no_further(tiny, monkeypatch, call):
    from blockllm_cli.training import checkpoint

    whole = tiny.run("checkpoint.every=5")
    with monkeypatch.context() as patch, pytest.raises(InterruptedRunError) as caught:
        strike_at(patch, checkpoint, "save_tensors", call, signal.SIGINT)
        tiny.run("checkpoint.every=5")
    assert caught.value.status == 130
    assert f"stopped at update {5 * ((call + 1) // 2)} and saved" in str(caught.value)
    cut = tiny.newest()
    assert not [path for path in (cut.folder / "checkpoints").iterdir() if path.name.startswith(".")]
    resumed = tiny.run("checkpoint.every=5", resume=cut.folder)
    equal_rows(whole.metrics, resumed.metrics)
    equal_tensors(whole.tensors(), resumed.tensors())


def test_a_signal_in_the_last_save_finds_the_run_complete(tiny, monkeypatch):
    from blockllm_cli.training import checkpoint

    strike_at(monkeypatch, checkpoint, "save_tensors", 2, signal.SIGTERM)
    assert tiny.run().summary["status"] == "completed"


def test_a_stop_of_evaluate_writes_nothing(tiny, monkeypatch):
    from blockllm_cli.model.llama import LlamaForCausalLM
    from blockllm_cli.runner.finished import evaluate_run

    run = tiny.run()
    before = content(run.folder)
    strike_at(monkeypatch, LlamaForCausalLM, "row_nll", 2, signal.SIGINT)
    with (
        pytest.raises(InterruptedRunError, match="stopped; nothing was written") as caught,
        Terminal(Console(quiet=True)) as terminal,
    ):
        evaluate_run(run.folder, step=None, overrides=["evaluate.rows=2"], terminal=terminal)
    assert caught.value.status == 130
    assert content(run.folder) == before
