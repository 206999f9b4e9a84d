"""A tokenizer.json as the tokenizer of a run: what it needs beside it, what is kept of it, what it does with text."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from small_streams import walk

from blockllm_cli.app import main
from blockllm_cli.data.corpus import Corpus
from blockllm_cli.data.fast_tokenizer import FastTokenizer, packed
from blockllm_cli.data.prepared import find_prepared
from blockllm_cli.data.prepared_writing import Preparation
from blockllm_cli.data.tokenizer import Tokenizer, load_tokenizer
from blockllm_cli.data.tokenizer_json import tokenizer_json
from blockllm_cli.data.tokenizer_training import draw_sample, train_tokenizer
from blockllm_cli.errors import InputError

tokenizers = pytest.importorskip("tokenizers")

TEXTS = ["The river  sees the stone.", "", " \n\t", "naïve \U0001f600", "</s> is <s> text"]


def made_file(folder: Path, texts: list[str], *, special: tuple[str, ...] = ("<s>", "</s>")) -> Path:
    """A byte-level BPE as GPT-2's, with cutting, padding and special tokens that training must not have."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def name_marks(path: Path, file: str = "tokenizer_config.json", **marks) -> None:
    path.with_name(file).write_text(json.dumps(marks), encoding="utf-8")


@pytest.fixture
def file(tmp_path: Path, tiny_corpus: Path) -> Path:
    path = made_file(tmp_path, (tiny_corpus / "train-0.jsonl").read_text("utf-8").splitlines())
    name_marks(path, bos_token="<s>", eos_token={"content": "</s>", "lstrip": False})
    return path


def test_text_becomes_ids_and_comes_back(file: Path) -> None:
    ours, plain = load_tokenizer(file), tokenizers.Tokenizer.from_file(str(file))
    plain.no_truncation()
    plain.no_padding()
    assert isinstance(ours, FastTokenizer)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (0, 1, plain.get_vocab_size())
    for text, ids in zip(TEXTS, ours.encode(TEXTS), strict=True):
        assert ids.dtype == np.int32
        assert ours.decode([0, *ids, 1, 999]) == text
    assert ours.encode(TEXTS[:1])[0].tolist() == plain.encode(TEXTS[0], add_special_tokens=False).ids
    # A document that holds the name of a mark has no mark in it.
    assert not {0, 1} & set(ours.encode(["</s> is <s> text"])[0].tolist())
    assert ours.decode(ours.encode(["a\ud800b"])[0]) == "a\ufffdb"


def test_all_of_it_is_in_its_bytes(file: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(file)
    kept = tmp_path / "run" / "tokenizer.model"
    kept.parent.mkdir()
    kept.write_bytes(ours.model_bytes)
    for again in (load_tokenizer(kept), FastTokenizer(ours.model_bytes), pickle.loads(pickle.dumps(ours))):
        assert isinstance(again, FastTokenizer)
        assert again.sha256 == ours.sha256
        assert (again.bos_id, again.eos_id, again.model_bytes) == (0, 1, ours.model_bytes)
        assert [ids.tolist() for ids in again.encode(TEXTS)] == [ids.tolist() for ids in ours.encode(TEXTS)]
    assert ours.json_text == file.read_text(encoding="utf-8")


def test_the_hash_follows_what_decides_ids(file: Path) -> None:
    before = load_tokenizer(file).sha256
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {"padding": None, "truncation": None}, indent=7), encoding="utf-8")
    assert load_tokenizer(file).sha256 == before
    name_marks(file, bos_token="</s>", eos_token="</s>")
    assert load_tokenizer(file).sha256 != before
    name_marks(file, bos_token="<s>", eos_token="</s>")
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(file).sha256 != before


def test_the_mark_that_ends_a_text_has_to_be_named(file: Path) -> None:
    name_marks(file, bos_token="<s>", eos_token=None)
    with pytest.raises(
        InputError, match=r"tokenizer\.json: no file says which token ends a text.*tokenizer_config\.json"
    ):
        load_tokenizer(file)
    name_marks(file, "special_tokens_map.json", eos_token="</s>")
    assert load_tokenizer(file).eos_id == 1
    name_marks(file, "special_tokens_map.json", eos_token="<end>")
    with pytest.raises(InputError, match="no token '<end>'"):
        load_tokenizer(file)


def test_without_a_mark_that_begins_a_text_that_of_the_end_stands_in(file: Path) -> None:
    name_marks(file, eos_token="</s>")
    assert load_tokenizer(file).bos_id == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": 1}', "neither a sentencepiece model nor a tokenizer.json"),
        ("{broken", "neither a sentencepiece model nor a tokenizer.json"),
        ('{"model": {"type": "Odd"}}', "cannot read this tokenizer.json"),
        ("", "empty"),
    ],
)
def test_other_files_are_refused_with_the_path(file: Path, content: str, words: str) -> None:
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        load_tokenizer(file)
    assert str(file) in str(caught.value)


def test_a_byte_order_mark_and_blanks_before_it_do_not_matter(file: Path) -> None:
    before = load_tokenizer(file).sha256
    file.write_bytes(b"\xef\xbb\xbf \n" + file.read_bytes())
    assert load_tokenizer(file).sha256 == before


def test_without_the_package_the_way_out_is_named(file: Path, tiny_tokenizer: Path, monkeypatch) -> None:
    content = packed(file.read_bytes(), [file.with_name("tokenizer_config.json")])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"pip install 'blockllm-cli\[hf\]'"):
        FastTokenizer(content)
    assert isinstance(load_tokenizer(tiny_tokenizer), Tokenizer)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_what_is_unknown_has_the_id_that_the_file_says(
    tmp_path: Path, tiny_corpus: Path, file: Path, kind: str
) -> None:
    assert load_tokenizer(file).unk_id == -1
    lines = (tiny_corpus / "train-0.jsonl").read_text("utf-8").splitlines()
    trained = train_tokenizer(draw_sample(lines, sample_bytes=10**6, seed=0), vocab_size=320, kind=kind)
    content = tokenizer_json(trained.model_bytes, opening=None)
    file.write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(file).unk_id == Tokenizer(trained.model_bytes).unk_id == 0


def test_bytes_that_were_not_packed_are_refused(file: Path) -> None:
    with pytest.raises(InputError, match="that was kept from"):
        FastTokenizer(file.read_bytes())


def test_a_run_trains_with_it_and_its_copy_is_enough(tiny, file: Path) -> None:
    run = tiny.run(f"tokenizer.path={file}", "model.vocab_size=400", "schedule.steps=5", "data.workers=1")
    assert run.summary["tokenizer_sha256"] == load_tokenizer(file).sha256
    cut = tiny.run(f"tokenizer.path={file}", "model.vocab_size=400", "schedule.steps=5", stop_after=2)
    for each in file.parent.glob("*.json"):
        each.unlink()
    again = tiny.run(f"tokenizer.path={file}", "model.vocab_size=400", "schedule.steps=5", resume=cut.folder)
    assert again.summary["train_rows_sha256"] == run.summary["train_rows_sha256"]


def test_the_id_of_what_is_unknown(tmp_path: Path, tiny_corpus: Path) -> None:
    assert load_tokenizer(named(made_file(tmp_path, TEXTS))).unk_id == -1
    models = tokenizers.models
    for model, expected in (
        (models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "river": 3}, unk_token="<unk>"), 2),
        (models.Unigram([("<s>", 0.0), ("</s>", 0.0), ("a", -1.0), ("<unk>", 0.0)], unk_id=3), 3),
    ):
        tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
        ours = load_tokenizer(tmp_path / "tokenizer.json")
        assert ours.unk_id == expected
        assert expected in ours.encode(["other"])[0]


def named(path: Path) -> Path:
    name_marks(path, bos_token="<s>", eos_token="</s>")
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_prepared_ids_give_the_rows_of_the_text(file: Path, tiny_corpus: Path, tmp_path: Path, workers: int) -> None:
    tokenizer = load_tokenizer(file)
    corpus = Corpus(tuple(sorted(tiny_corpus.glob("train-*.jsonl"))))
    with Preparation(tokenizer, tmp_path / "cache", workers=workers) as preparation:
        for shard in corpus.shards[:2]:
            preparation.prepare(shard)
    prepared = find_prepared(corpus.shards, tokenizer, tmp_path / "cache")
    assert len(prepared.entries) == 2
    plain = walk(corpus, [20] * 10, tokenizer=tokenizer)
    assert walk(corpus, [20] * 10, tokenizer=tokenizer, prepared=prepared) == plain


def test_shards_are_prepared_and_shown_with_it(tiny, file: Path, tmp_path: Path, capsys) -> None:
    settings = [f"tokenizer.path={file}", "model.vocab_size=400", f"data.cache={tmp_path / 'cache'}"]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    assert main(["data", "inspect", str(tiny.recipe), *flags]) == 0
    plain = tiny.run(*settings, "schedule.steps=5")
    assert main(["data", "prepare", str(tiny.recipe), *flags]) == 0
    prepared = tiny.run(*settings, "schedule.steps=5")
    assert prepared.summary["train_rows_sha256"] == plain.summary["train_rows_sha256"]
    capsys.readouterr()
