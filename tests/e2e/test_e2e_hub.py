"""The papers' protocol by the installed command, on a hub shaped like the real one and without any network."""

import gzip
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece

from support.hub import like_c4, running_hub
from support.tiny import Result, equal_rows, equal_tensors

SMALL = (
    "batch.rows=16",
    "evaluate.tokens=20000",
    "model.hidden_size=64",
    "model.intermediate_size=172",
    "model.num_attention_heads=2",
    "model.num_hidden_layers=2",
    "data.block_documents=256",
    "data.retry_seconds=5",
    "run.precision=bf16",
    "tracking.log_rows=true",
)
RECIPE = Path(__file__).parents[2] / "recipes" / "c4" / "60m.toml"


def t5_like(texts: list[str]) -> bytes:
    """A model with T5's special pieces: padding 0, end 1, unknown 2, and no beginning."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text.replace("\n", " ")[:2000] for text in texts),
        model_writer=model,
        vocab_size=2000,
        model_type="unigram",
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    return model.getvalue()


@pytest.fixture
def place(tmp_path: Path, shared_dir: Path):
    """A folder for one user, and a function that calls the command there."""
    folder = shared_dir / "data" / "realtext" / "en"
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))},
        "HF_HOME": str(tmp_path / "hf"),
        "BLOCKLLM_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }

    def call(*arguments: str, sets: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess:
        command = [str(Path(sys.executable).with_name("blockllm")), "pretrain", *arguments]
        for each in sets:
            command += ["--set", each]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return folder, call


@pytest.mark.slow
@pytest.mark.realtext
def test_the_papers_protocol_runs_from_a_hub_resumes_and_gives_the_rows_of_files(place, tmp_path):
    folder, call = place
    with running_hub() as hub:
        like_c4(
            hub,
            {path.name: path.read_bytes() for path in sorted(folder.glob("c4-train.*"))},
            {path.name: path.read_bytes() for path in folder.glob("c4-validation.*")},
        )
        with gzip.open(folder / "c4-train.00000-of-00008.json.gz", "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines][:600]
        hub.add("google-t5/t5-base", "spiece.model", t5_like(texts), kind="models")
        (tmp_path / "t5.model").write_bytes(t5_like(texts))
        recipe = str(RECIPE)
        first = call(recipe, "--stop-after", "3", sets=SMALL, HF_ENDPOINT=hub.url)
        assert first.returncode == 0, first.stderr
        assert first.stderr.strip() == ""
        run = Result(tmp_path / first.stdout.strip().splitlines()[-1], first.stdout)
        assert hub.shards_sent() < sum(len(content) for content in hub.files.values()) / 3  # what it reads, no more
        again = call("--resume", str(run.folder), "--stop-after", "5", HF_ENDPOINT=hub.url)
        assert again.returncode == 0, again.stderr
    files = (
        "data.corpus=files",
        f"data.train={folder}/c4-train.*",
        f"data.validation={folder}/c4-validation.*",
        "tokenizer.source=file",
        f"tokenizer.path={tmp_path / 't5.model'}",
        "run.name=files",
    )
    other = call(recipe, "--stop-after", "5", sets=(*SMALL, *files))
    assert other.returncode == 0, other.stderr
    local = Result(tmp_path / other.stdout.strip().splitlines()[-1], other.stdout)
    assert run.summary["train_rows_sha256"] == local.summary["train_rows_sha256"]
    assert run.rows == local.rows
    equal_rows(run.metrics, local.metrics)
    equal_tensors(run.tensors(), local.tensors())


@pytest.mark.slow
@pytest.mark.realtext
@pytest.mark.parametrize("variables", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_network_it_ends_soon_with_what_works_without_one(place, tmp_path, variables):
    _, call = place
    begun = time.monotonic()
    done = call(str(RECIPE), sets=SMALL, **variables)
    assert time.monotonic() - begun < 75  # 15 s are promised; five times that, for a machine that does other things
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "--set data.corpus=builtin" in done.stderr
    assert "--set data.corpus=files" in done.stderr
    assert not (tmp_path / "runs").exists()
