"""Fixtures shared by the whole suite: golden numbers, real text where there is any, a tiny corpus."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.hub import Hub, running_hub
from support.tiny import TinyRuns

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the command does, before anything loads torch
GOLDEN = Path(__file__).parent / "golden"
WITHOUT_REAL_TEXT = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[WITHOUT_REAL_TEXT] = []


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Say how many tests found no real text, so that a green run cannot hide that they did not run."""
    missing = config.stash[WITHOUT_REAL_TEXT]
    terminalreporter.write_line(f"tests that found no real text (BLOCKLLM_SHARED): {len(missing)}")


@pytest.fixture
def shared_dir(request: pytest.FixtureRequest) -> Path:
    """Folder with `data/realtext` and `data/awkward`: $BLOCKLLM_SHARED, else `shared` beside the checkout."""
    named = os.environ.get("BLOCKLLM_SHARED")
    place = Path(named) if named else Path(__file__).parents[2] / "shared"
    if not (place / "data" / "realtext").is_dir():
        request.config.stash[WITHOUT_REAL_TEXT].append(request.node.nodeid)
        pytest.skip(f"no real text: {place} has no data/realtext; set BLOCKLLM_SHARED to a folder that has it")
    return place


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict]:
    """Read tests/golden/<name>.safetensors: recorded inputs and outputs of public implementations."""
    from safetensors.torch import load_file

    def read(name: str) -> dict:
        return load_file(GOLDEN / f"{name}.safetensors")

    return read


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train-0/1/2.jsonl and validation.jsonl: 360 + 40 short documents that carry their own number."""
    folder = tmp_path_factory.mktemp("tiny-corpus")
    draw = random.Random(17)
    nouns = [
        "river",
        "stone",
        "garden",
        "letter",
        "window",
        "doctor",
        "market",
        "winter",
        "engine",
        "valley",
        "teacher",
        "morning",
    ]
    verbs = ["sees", "keeps", "follows", "remembers", "crosses", "paints", "answers", "carries"]
    places = ["near the old mill", "in the north", "before dawn", "without a word", "for the third time"]

    def document(number: int) -> str:
        sentences = [f"Document {number} begins."]
        for _ in range(draw.randint(1, 9)):
            sentences.append(
                f"The {draw.choice(nouns)} {draw.choice(verbs)} the {draw.choice(nouns)} {draw.choice(places)}."
            )
        return " ".join(sentences)

    for shard in range(3):
        lines = [json.dumps({"text": document(shard * 120 + i)}) for i in range(120)]
        (folder / f"train-{shard}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = [json.dumps({"text": document(10_000 + i)}) for i in range(40)]
    (folder / "validation.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of 300 pieces trained on the tiny corpus."""
    from blockllm_cli.data.tokenizer_training import draw_sample, train_tokenizer

    lines = (tiny_corpus / "train-0.jsonl").read_text(encoding="utf-8").splitlines()
    sample = draw_sample((json.loads(line)["text"] for line in lines), sample_bytes=1_000_000, seed=0)
    trained = train_tokenizer(sample, vocab_size=300, kind="bpe")
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    path.write_bytes(trained.model_bytes)
    return path


@pytest.fixture
def tiny(tmp_path: Path, tiny_corpus: Path, tiny_tokenizer: Path) -> TinyRuns:
    """Runs of a tiny Llama under a folder of this test."""
    return TinyRuns(tmp_path, tiny_corpus, tiny_tokenizer)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub on the loopback address, which the client libraries of this process take for the real one.

    `hub.url` is for processes of their own: HF_ENDPOINT.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(
            datasets.config, "HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}"
        )
        monkeypatch.setenv("BLOCKLLM_CACHE", str(tmp_path / "cache"))
        for variable in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(variable, raising=False)
        huggingface_hub.HfFileSystem.clear_instance_cache()
        yield hub
        huggingface_hub.HfFileSystem.clear_instance_cache()
