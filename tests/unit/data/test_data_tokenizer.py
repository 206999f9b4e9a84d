"""The tokenizer and its training: what comes back is what went in, and nothing of the sample is lost (R27, R28)."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockllm_cli.data import tokenizer_training
from blockllm_cli.data.tokenizer import Tokenizer, load_tokenizer
from blockllm_cli.data.tokenizer_training import (
    LINE_CHARACTERS,
    SMALLEST_VOCABULARY,
    TrainedTokenizer,
    draw_sample,
    lines_of,
    train_tokenizer,
)
from blockllm_cli.errors import InputError, StopRequested


def never() -> bool:
    return False


def train(texts, vocab_size: int = 330, kind: str = "bpe", **changed) -> TrainedTokenizer:
    settings = {"sample_bytes": 2**20, "seed": 0} | changed
    should_stop = settings.pop("should_stop", never)
    sample = draw_sample(texts, should_stop=should_stop, **settings)
    return train_tokenizer(sample, vocab_size=vocab_size, kind=kind, should_stop=should_stop)


def documents_of(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


@pytest.fixture(scope="module")
def tiny_texts(tiny_corpus: Path) -> list[str]:
    lines = [line for path in sorted(tiny_corpus.glob("train-*")) for line in path.read_text("utf-8").splitlines()]
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def tokenizer(tiny_texts: list[str]) -> Tokenizer:
    return Tokenizer(train(tiny_texts).model_bytes)


@given(st.text())
@example("  two  spaces, at the ends too  ")
@example("lines\n\n\r\n\tand tabs\x00null\x85\u2028\ufeff")
@example("\U0001f600 e\u0301 \u0639\u0631\u0628\u064a")
@settings(deadline=None)
def test_any_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode([text])
    # U+2581 is how sentencepiece writes a space, so it is the one character that cannot come back.
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")
    assert ids.dtype == np.int32
    assert not set(ids) & {0, tokenizer.bos_id, tokenizer.eos_id}


def test_real_documents_come_back_exactly_and_none_is_skipped(shared_dir: Path) -> None:
    texts = documents_of(shared_dir / "data/realtext/en/c4-validation.00000-of-00001.json.gz")
    trained = train(texts, vocab_size=2048, sample_bytes=2**22)
    real = Tokenizer(trained.model_bytes)
    assert [real.decode(ids) for ids in real.encode(texts)] == texts
    assert trained.report["documents_used"] == len(texts)
    assert real.vocab_size == 2048


def test_odd_input_is_encoded_and_not_an_error(tokenizer: Tokenizer) -> None:
    replaced, plain, empty = tokenizer.encode(["a\ud800b", "a\ufffdb", ""])
    assert replaced.tolist() == plain.tolist()
    assert empty.shape == (0,)
    assert empty.dtype == np.int32
    assert tokenizer.encode([]) == []


def test_ids_past_the_vocabulary_are_unknown(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode(["the river"])
    assert tokenizer.decode([*ids, tokenizer.vocab_size, -1]) == tokenizer.decode([*ids, 0, 0])
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "the river"


def test_a_batch_gives_what_single_texts_give(tokenizer: Tokenizer, tiny_texts: list[str]) -> None:
    batch = tokenizer.encode(tiny_texts[:50])
    singly = [tokenizer.encode([text])[0] for text in tiny_texts[:50]]
    assert all(np.array_equal(a, b) for a, b in zip(batch, singly, strict=True))


def test_ids_of_the_marks_and_pickling(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 330)
    twin = pickle.loads(pickle.dumps(tokenizer))
    assert twin.sha256 == tokenizer.sha256
    assert twin.encode(["the stone"])[0].tolist() == tokenizer.encode(["the stone"])[0].tolist()


def test_a_model_without_bos_begins_documents_with_eos(tiny_texts: list[str], tmp_path: Path) -> None:
    """The papers' T5 model has pad 0, eos 1, unk 2 and no bos."""
    t5_like = Tokenizer(model_with(tiny_texts, tmp_path, pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
    assert (t5_like.bos_id, t5_like.eos_id) == (1, 1)
    with pytest.raises(InputError, match="eos"):
        Tokenizer(model_with(tiny_texts, tmp_path, unk_id=0, bos_id=1, eos_id=-1))


def model_with(texts: list[str], folder: Path, **trainer: object) -> bytes:
    """A small model straight from sentencepiece."""
    (folder / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    model = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 120, "minloglevel": 2, "num_threads": 1} | trainer
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text.txt"), model_writer=model, **options)
    return model.getvalue()


def test_identity_is_of_pieces_and_scores_not_of_the_file(tiny_texts: list[str], tmp_path: Path) -> None:
    one = model_with(tiny_texts, tmp_path, num_threads=1)
    four = model_with(tiny_texts, tmp_path, num_threads=4)
    assert one != four
    assert Tokenizer(one).sha256 == Tokenizer(four).sha256
    assert Tokenizer(model_with(tiny_texts, tmp_path, vocab_size=121)).sha256 != Tokenizer(one).sha256
    score = struct.pack("<f", -50.0)
    assert one.count(score) == 1
    assert Tokenizer(one.replace(score, struct.pack("<f", -500.0))).sha256 != Tokenizer(one).sha256


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_equal_text_and_seed_give_the_same_tokenizer_whatever_the_threads(
    tiny_texts: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R27: pieces and scores do not depend on the threads a user allows, since training has its own fixed number."""
    made = []
    for threads in ("1", "4"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        made.append(train(tiny_texts, kind=kind))
    assert Tokenizer(made[0].model_bytes).sha256 == Tokenizer(made[1].model_bytes).sha256
    assert made[0].report == made[1].report
    assert made[0].model_bytes == made[1].model_bytes


def test_a_long_document_with_letters_of_its_own_is_learned(tiny_texts: list[str]) -> None:
    """R27: one 20 kB document on one line, without a space; sentencepiece alone would leave it out."""
    greek = "\u03b1\u03b2\u03b3\u03b4\u03b5\u03b6\u03b7\u03b8\u03b9\u03ba" * 1000
    trained = train([*tiny_texts, greek], vocab_size=600)
    (ids,) = Tokenizer(trained.model_bytes).encode([greek])
    assert len(ids) < len(greek)  # two bytes a letter would be 20,000 pieces
    assert trained.report["lines_cut"] == 1
    assert trained.report["documents_cut"] == 0


@pytest.mark.parametrize("mark", ["\x00", "\u2585", "\u2581", "\t", "\r", "\u2028", "\ufeff"])
def test_lines_with_reserved_characters_are_learned_and_not_skipped(tiny_texts: list[str], mark: str) -> None:
    known = Tokenizer(train([*tiny_texts, *[f"zyqxjk {mark} zyqxjk"] * 999], vocab_size=500).model_bytes)
    (ids,) = known.encode(["zyqxjk"])
    assert len(ids) == 1


@given(st.text(alphabet=st.sampled_from("ab \n\x00\u2585\t\u4e2d"), max_size=300))
@settings(deadline=None)
def test_cutting_lines_loses_only_what_is_cut_at(text: str) -> None:
    kept = "".join(piece for pieces in lines_of(text * 40) for piece in pieces)
    marks = {ord(mark): None for mark in " \n\x00\u2585"}
    assert kept.translate(marks) == (text * 40).translate(marks)
    assert all(0 < len(piece) <= LINE_CHARACTERS for pieces in lines_of(text * 40) for piece in pieces)


def test_a_vocabulary_the_text_cannot_give_is_an_input_error_with_the_reachable_size(tiny_texts: list[str]) -> None:
    """R27: 90,000 pieces from few lines."""
    for kind in ("bpe", "unigram"):
        with pytest.raises(InputError, match=r"tokenizer\.vocab_size = 90000.*at most (\d+) pieces") as caught:
            train(tiny_texts, vocab_size=90_000, kind=kind)
        assert caught.value.exit_code == 3
        reachable = int(str(caught.value).split("at most ")[1].split()[0])
        assert Tokenizer(train(tiny_texts, vocab_size=reachable, kind=kind).model_bytes).vocab_size == reachable


def test_the_smallest_vocabularies(tiny_texts: list[str]) -> None:
    """R28 asks for 300 pieces: fewer than the text has characters and bytes."""
    for vocab_size in (SMALLEST_VOCABULARY, 300):
        small = Tokenizer(train(tiny_texts, vocab_size=vocab_size).model_bytes)
        assert small.vocab_size == vocab_size
        assert [small.decode(ids) for ids in small.encode(tiny_texts)] == tiny_texts
    with pytest.raises(InputError, match=f"vocab_size = 260: at least {SMALLEST_VOCABULARY}"):
        train(tiny_texts, vocab_size=260)


@pytest.mark.parametrize("texts", [[], ["", "\n\n"]])
def test_no_text_is_an_input_error(texts: list[str]) -> None:
    with pytest.raises(InputError, match="no text to train a tokenizer on"):
        train(texts)


@given(
    texts=st.lists(st.text(alphabet="ab\u00e9\u4e2d", min_size=1, max_size=30), max_size=30),
    sample_bytes=st.integers(1, 400),
    seed=st.integers(0, 3),
)
@settings(deadline=None)
def test_the_sample_is_bounded_complete_and_seeded(texts: list[str], sample_bytes: int, seed: int) -> None:
    sample = draw_sample(texts, sample_bytes=sample_bytes, seed=seed, should_stop=never)
    assert sample == draw_sample(iter(texts), sample_bytes=sample_bytes, seed=seed, should_stop=never)
    counts = sample.counts
    assert counts["corpus_exhausted"] or counts["bytes_seen"] >= tokenizer_training.SCAN_FACTOR * sample_bytes
    assert counts["bytes_used"] == min(sample_bytes, counts["bytes_seen"])
    size = sum(len(text.encode()) for text in sample.texts)
    # The cut may fall into a character of up to three bytes, of which nothing is kept.
    assert counts["bytes_used"] - 2 * counts["documents_cut"] <= size <= counts["bytes_used"]
    if counts["bytes_seen"] <= sample_bytes:
        assert sample.texts == texts


def test_the_sample_is_drawn_from_the_whole_corpus_and_not_from_its_start() -> None:
    texts = [f"{i:04d}" for i in range(1000)]
    chosen = {seed: draw_sample(texts, sample_bytes=400, seed=seed, should_stop=never).texts for seed in range(40)}
    assert all(len(sample) == 100 and sample == sorted(sample) for sample in chosen.values())
    assert chosen[0] != chosen[1]
    mean = np.mean([int(text) for sample in chosen.values() for text in sample])
    # 4,000 draws of a uniform variable with deviation 289: 5 deviations of the mean are 23.
    assert abs(mean - 499.5) < 25


def test_an_endless_corpus_is_not_read_to_its_end() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "again "

    sample = draw_sample(endless(), sample_bytes=600, seed=0, should_stop=never)
    assert sample.counts["documents_seen"] == 100 * tokenizer_training.SCAN_FACTOR
    assert not sample.counts["corpus_exhausted"]


def test_a_stop_while_sampling_and_while_training_acts_at_once(tiny_texts: list[str]) -> None:
    """R11: the process that trains is killed, however long its training would have taken."""
    with pytest.raises(StopRequested):
        train(tiny_texts, should_stop=lambda: True)
    before = set(children())
    calls = 0

    def soon() -> bool:
        nonlocal calls
        calls += 1
        return calls > len(tiny_texts) + 1 and bool(set(children()) - before)

    with pytest.raises(StopRequested):
        train(tiny_texts, vocab_size=600, kind="unigram", should_stop=soon)
    assert set(children()) <= before


def children() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True)]


def test_a_killed_training_process_is_explained(tiny_texts: list[str]) -> None:
    before = set(children())

    def kill_it() -> bool:
        for pid in set(children()) - before:
            os.kill(pid, signal.SIGKILL)
        return False

    with pytest.raises(InputError, match=r"SIGKILL.*memory.*tokenizer\.sample_bytes"):
        train(tiny_texts, should_stop=kill_it)


def test_signals_to_the_group_are_left_to_the_parent_and_a_dead_parent_ends_the_child(tmp_path: Path) -> None:
    """R11: Ctrl-C reaches parent and child at once; the child must neither fail by itself nor outlive the parent."""
    sample = tmp_path / "sample.txt"
    os.mkfifo(sample)  # opening it waits for a writer that never comes: a training that never ends
    command = [sys.executable, "-m", "blockllm_cli.data.tokenizer_training", "bpe", "400"]
    child = subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    process = psutil.Process(child.pid)
    # The watcher's thread is started after both signals are ignored.
    wait_until(lambda: process.num_threads() > 1 and is_waiting_for(sample, process))
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.3)
    assert child.stdin is not None
    child.stdin.close()  # as the parent's death would
    assert child.wait(60) == 1


def is_waiting_for(sample: Path, process: psutil.Process) -> bool:
    """Whether the child got as far as opening its sample; numpy's and the library's modules are loaded by then."""
    return sample.is_fifo() and any("sentencepiece" in mapped.path for mapped in process.memory_maps())


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_training_needs_neither_torch_nor_a_utf8_locale() -> None:
    """R25: under LC_ALL=C without Python's UTF-8 mode files are still UTF-8."""
    code = (
        "import sys\n"
        "from blockllm_cli.data import tokenizer, tokenizer_training\n"
        "texts = ['\\u00e9\\u00e8\\u4e2d ' * 99, 'plain words here and there']\n"
        "sample = tokenizer_training.draw_sample(texts, sample_bytes=10**6, seed=0)\n"
        "trained = tokenizer_training.train_tokenizer(sample, vocab_size=262, kind='bpe')\n"
        "print(tokenizer.Tokenizer(trained.model_bytes).sha256)\n"
        "print([name for name in ('torch', 'datasets', 'transformers') if name in sys.modules])\n"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | changed, check=True, capture_output=True, text=True
        ).stdout.splitlines()
        for changed in ({}, ascii_only)
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0][1] == "[]"


def test_a_current_folder_with_modules_of_its_own_does_no_harm(
    tiny_texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(9)", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert train(tiny_texts).report["documents_used"] == len(tiny_texts)


def test_loading_a_model_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tok\u00e9nizer v1.model"
    path.write_bytes(tokenizer.model_bytes)
    assert load_tokenizer(path).sha256 == tokenizer.sha256


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "there is no such file"), (b"", "is empty"), (b"not a model " * 20, "damaged"), (1000, "damaged")],
)
def test_a_missing_or_damaged_model_file_is_an_input_error(
    tokenizer: Tokenizer, tmp_path: Path, content: bytes | int | None, problem: str
) -> None:
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(tokenizer.model_bytes[:content] if isinstance(content, int) else content)
    with pytest.raises(InputError, match=rf"{path}: .*{problem}") as caught:
        load_tokenizer(path)
    assert caught.value.exit_code == 3
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)
