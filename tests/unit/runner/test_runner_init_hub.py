"""Initial models and tokenizers of the form `tokenizer.json` from a hub, through the real client library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blockllm_cli.data.tokenizer_json import tokenizer_json
from blockllm_cli.errors import InputError
from support.hf import written_checkpoint
from support.hub import Hub
from support.tiny import TinyRuns, equal_rows, equal_tensors

SHORT = ("schedule.steps=6", "schedule.warmup=0", "evaluate.every=3", "data.retry_seconds=1")
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def put(hub: Hub, repository: str, folder: Path) -> None:
    for path in folder.iterdir():
        hub.add(repository, path.name, path.read_bytes(), kind="models")


@pytest.fixture
def bare(tiny: TinyRuns) -> TinyRuns:
    """A recipe that says nothing of the architecture."""
    lines = [line for line in tiny.recipe.read_text().splitlines() if not line.startswith(SHAPE)]
    tiny.recipe.write_text("\n".join(lines))
    return tiny


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_repository_is_the_folder_it_holds_and_is_kept(hub, bare, tmp_path, monkeypatch, shard_bytes):
    written_checkpoint(tmp_path / "llama", shard_bytes=shard_bytes)
    put(hub, "owner/llama", tmp_path / "llama")
    from_folder = bare.run(*SHORT, f"model.init={tmp_path / 'llama'}")
    from_hub = bare.run(*SHORT, "model.init=owner/llama@main")
    equal_rows(from_hub.metrics, from_folder.metrics)
    equal_tensors(from_hub.tensors(), from_folder.tensors())
    assert from_hub.summary["init"]["files"] == from_folder.summary["init"]["files"]
    assert from_hub.summary["init"]["name"] == "owner/llama@main"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    equal_rows(bare.run(*SHORT, "model.init=owner/llama@main").metrics, from_folder.metrics)
    with pytest.raises(InputError, match=r"config\.json of owner/other cannot be fetched"):
        bare.run(*SHORT, "model.init=owner/other")


def test_a_repository_without_safetensors_is_refused(hub, bare, tmp_path):
    written_checkpoint(tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").rename(tmp_path / "llama" / "pytorch_model.bin")
    put(hub, "owner/llama", tmp_path / "llama")
    with pytest.raises(InputError, match="owner/llama has neither"):
        bare.run(*SHORT, "model.init=owner/llama")
    with pytest.raises(InputError, match="has no such model"):
        bare.run(*SHORT, "model.init=owner/nothing")


def test_a_tokenizer_json_comes_with_the_files_that_name_its_marks(hub, tiny):
    pytest.importorskip("tokenizers")
    content = json.dumps(tokenizer_json(tiny.tokenizer.read_bytes(), opening=1)).encode()
    hub.add("owner/words", "tokenizer.json", content, kind="models")
    hub.add("owner/words", "tokenizer_config.json", b'{"bos_token": "<s>", "eos_token": "</s>"}', kind="models")
    run = tiny.run(*SHORT, "tokenizer.source=hub", "tokenizer.path=owner/words")
    plain = tiny.run(*SHORT)
    assert run.summary["train_rows_sha256"] == plain.summary["train_rows_sha256"]
    assert run.summary["tokenizer_sha256"] != plain.summary["tokenizer_sha256"]
