"""The tokenised cache: what is read from it is what the text gives, and what is damaged is not trusted."""

import errno
import gzip
import json
import os
import shutil
import threading
from contextlib import nullcontext
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_shards import lines_of
from small_streams import good, settings, walk, write_shards
from word_tokenizer import FailingTokenizer, WordTokenizer

from blockllm_cli.data import prepared_format, prepared_writing, reader
from blockllm_cli.data.blocks import Cursor, TextBlock, build_block, read_blocks
from blockllm_cli.data.corpus import Corpus
from blockllm_cli.data.prepared import (
    PreparedDocument,
    PreparedReader,
    PreparedShards,
    find_prepared,
    lengths_of,
)
from blockllm_cli.data.prepared_format import IDS, MANIFEST, RECORDS, ids_type, open_entry, tokens_folder
from blockllm_cli.data.prepared_need import RowCount
from blockllm_cli.data.prepared_writing import Preparation
from blockllm_cli.data.reader import Position, ShardReader
from blockllm_cli.data.records import Document
from blockllm_cli.data.stream import validation_rows
from blockllm_cli.data.tokenizer import load_tokenizer
from blockllm_cli.errors import InputError, StopRequested, StorageError


def nothing(documents: int) -> None:
    pass


def prepare(corpus: Corpus, cache: Path, *, which=slice(None), tokenizer=None, report=nothing, **keys) -> list:
    with Preparation(tokenizer or WordTokenizer(), cache, **{"workers": 0, **keys}) as preparation:
        return [preparation.prepare(shard, report) for shard in corpus.shards[which]]


def found(corpus: Corpus, cache: Path, tokenizer=None, say=lambda line: None) -> PreparedShards:
    return find_prepared(corpus.shards, tokenizer or WordTokenizer(), cache, say)


def as_ids(record) -> tuple:
    """A record of either reader, with ids in place of text."""
    if isinstance(record, Document):
        return (record.line, WordTokenizer().encode([record.text])[0].tolist(), record.surrogates, record.bytes)
    if isinstance(record, PreparedDocument):
        return (record.line, record.ids.tolist(), record.surrogates, record.bytes)
    return tuple(record)


def said(reading: ShardReader | PreparedReader) -> list[tuple]:
    return [(type(record).__name__.removeprefix("Prepared"), as_ids(record), reading.position) for record in reading]


@pytest.fixture
def odd_corpus(tmp_path) -> Corpus:
    """Shards of every format, with damage, blank lines, paragraphs, and nothing at all."""
    folder = tmp_path / "odd"
    folder.mkdir()
    whole = gzip.compress(b"\n".join(lines_of(300)), mtime=0)
    contents = {
        "a.json.gz": whole[: len(whole) // 2],
        "b.jsonl": b'\xef\xbb\xbf{"text": 3}\n{"text": "one two"}\r\n\n\n{"text": " "}\n'
        b'{"text": "a \\ud800 b"}\nbroken\n{"text": "end"}',
        "c.txt": b"first\nparagraph here\n\n\nsecond one\n\n \n\xff\n\nlast",
        "d.jsonl": b"",
        "e.jsonl": b"broken\n",
        "f.jsonl": b'{"text": "\\u200b"}\n',
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    rows = pa.table({"text": ["one two", None, " ", *(f"row {i} of many" for i in range(20))]})
    pq.write_table(rows, folder / "g.parquet", row_group_size=7)
    return Corpus(tuple(sorted(folder.iterdir())))


# The same records, rows, events and positions.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_prepared_shard_says_what_its_text_says(odd_corpus, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(prepared_writing, "_BATCH_DOCUMENTS", 7)
    prepare(odd_corpus, tmp_path / "cache", workers=workers)
    assert active_children() == []
    entries = found(odd_corpus, tmp_path / "cache")
    for shard in odd_corpus.shards:
        plain = ShardReader(shard)
        whole = said(plain)
        assert whole
        reading = entries.reader(shard)
        assert isinstance(reading, PreparedReader)
        assert said(reading) == whole
        for kind, _, position in whole:
            if kind == "Document":
                rest = said(ShardReader(shard, position))
                assert said(entries.reader(shard, position)) == rest
                assert len(rest) < len(whole)


@pytest.mark.realtext
def test_so_does_every_awkward_file(shared_dir, tmp_path):
    corpus = Corpus(tuple(sorted((shared_dir / "data" / "awkward").glob("*.json.gz"))))
    assert len(corpus.shards) == 18
    prepare(corpus, tmp_path / "cache")
    entries = found(corpus, tmp_path / "cache")
    for shard in corpus.shards:
        assert said(entries.reader(shard)) == said(ShardReader(shard)), shard.name


@pytest.mark.realtext
def test_real_text_under_a_real_tokenizer_gives_the_same_rows(shared_dir, tiny_tokenizer, tmp_path):
    folder = shared_dir / "data" / "realtext" / "en"
    corpus = Corpus(tuple(sorted(folder.glob("*validation*.json.gz"))[:1]), "train")
    tokenizer = load_tokenizer(tiny_tokenizer)
    prepare(corpus, tmp_path / "cache", tokenizer=tokenizer)
    keys = {"tokenizer": tokenizer, "sequence_length": 128, "block_documents": 60}
    plain = walk(corpus, [16] * 40, **keys)
    assert walk(corpus, [16] * 40, prepared=found(corpus, tmp_path / "cache", tokenizer), **keys) == plain


@pytest.mark.parametrize("part", ["all", "train", "validation"])
@pytest.mark.parametrize("which", [slice(None), slice(1), slice(1, 3)])
def test_rows_events_and_states_do_not_depend_on_what_is_prepared(odd_corpus, tmp_path, part, which):
    corpus = Corpus(odd_corpus.shards, part)
    takes = [3] * (60 if part != "validation" else 3)
    prepare(corpus, tmp_path / "cache", which=which)
    entries = found(corpus, tmp_path / "cache")
    assert len(entries.entries) == len(corpus.shards[which])
    for keys in ({"layout": "pack"}, {"layout": "truncate", "block_documents": 50, "workers": 1}):
        plain = walk(corpus, takes, **keys)
        assert walk(corpus, takes, prepared=entries, **keys) == plain
        for i in (0, len(takes) // 2):
            state, rest = json.loads(json.dumps(plain[i][4])), takes[i + 1 :]
            assert walk(corpus, rest, prepared=entries, state=state, **keys) == plain[i + 1 :]
    assert {event["kind"] for row in plain for event in row[3]} >= {"bad_document"}


def test_blocks_mix_prepared_and_unprepared_shards(tmp_path):
    corpus = write_shards(tmp_path / "corpus", [good(i) for i in range(30)], 3)
    prepare(corpus, tmp_path / "cache", which=slice(1, 2))
    entries = found(corpus, tmp_path / "cache")
    block = next(read_blocks(corpus, settings=settings(block_documents=30), prepared=entries))
    assert sorted({type(text).__name__ for text in block.texts}) == ["ndarray", "str"]
    assert block.bytes == next(read_blocks(corpus, settings=settings(block_documents=30))).bytes > 0


def test_the_limit_of_bad_documents_is_reached_at_the_same_one(odd_corpus, tmp_path):
    prepare(odd_corpus, tmp_path / "cache")
    messages = []
    for entries in (PreparedShards(), found(odd_corpus, tmp_path / "cache")):
        with pytest.raises(InputError, match="bad documents so far") as caught:
            walk(odd_corpus, [50] * 50, max_bad_documents=3, prepared=entries)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_validation_rows_are_the_same(odd_corpus, tmp_path):
    prepare(odd_corpus, tmp_path / "cache")
    entries = found(odd_corpus, tmp_path / "cache")
    for part in ("all", "validation"):
        corpus, events, prepared_events = Corpus(odd_corpus.shards, part), [], []
        plain = validation_rows(corpus, WordTokenizer(), settings(), 60, report=events.append)
        rows = validation_rows(corpus, WordTokenizer(), settings(), 60, report=prepared_events.append, prepared=entries)
        assert rows.pieces.tolist() == plain.pieces.tolist()
        assert rows.labels == plain.labels
        assert events == prepared_events


def test_nothing_of_a_prepared_shard_is_parsed_or_tokenised(corpus, tmp_path, monkeypatch):
    takes = [5] * 30
    plain = walk(corpus, takes)
    prepare(corpus, tmp_path / "cache")
    monkeypatch.setattr(reader, "_parsed", None)
    monkeypatch.setattr(WordTokenizer, "encode", lambda self, texts: [1 / 0 for _ in texts])
    assert walk(corpus, takes, prepared=found(corpus, tmp_path / "cache")) == plain


def test_a_resume_looks_only_at_the_ids_of_its_block(tmp_path, monkeypatch):
    """At most one block is read again: no id before the block in progress is touched."""
    corpus = write_shards(tmp_path / "corpus", [good(i) for i in range(700)], 1)
    entry = prepare(corpus, tmp_path / "cache")[0].entry
    entries = found(corpus, tmp_path / "cache")
    state = walk(corpus, [640], layout="truncate")[0][4]
    expected = walk(corpus, [30], layout="truncate", state=state)
    with (entry.folder / IDS).open("r+b") as file:  # what lies before the block is made unusable
        before = int(np.cumsum(lengths_of(entry, "all"))[state["block"] * 7 - 1])
        file.write(b"\xff" * 2 * before)
    assert state["block"] == 91
    assert walk(corpus, [30], layout="truncate", state=state, prepared=entries) == expected


# What is found, and what is not trusted.


def test_an_entry_is_found_by_content_wherever_the_file_lies(corpus, tmp_path):
    prepare(corpus, tmp_path / "cache")
    moved = tmp_path / "elsewhere"
    shutil.copytree(corpus.shards[0].parent, moved)
    os.utime(moved / "s0.jsonl", (1, 1))
    there = Corpus(tuple(sorted(moved.iterdir())))
    assert len(found(there, tmp_path / "cache").entries) == 3
    for second in prepare(corpus, tmp_path / "cache"):
        assert second.made is False
    other = WordTokenizer(b"words, others")
    assert found(corpus, tmp_path / "cache", other).entries == {}
    assert tokens_folder(tmp_path, other) != tokens_folder(tmp_path, FailingTokenizer(b"words, others"))


def test_a_file_that_changed_between_its_ends_is_read_and_prepared_again(tmp_path, monkeypatch):
    """The identity of a file looks at its ends: its time and its hash tell what it does not."""
    monkeypatch.setattr("blockllm_cli.data.shards.SAMPLED_BYTES", 4)
    corpus = write_shards(tmp_path / "corpus", ['{"text": "one two three"}', '{"text": "four"}'], 1)
    prepare(corpus, tmp_path / "cache")
    corpus.shards[0].write_text(corpus.shards[0].read_text().replace("two", "TWO"))
    entries = found(corpus, tmp_path / "cache")
    assert entries.entries == {}
    assert "has changed since it was prepared" in entries.problems[0]
    assert prepare(corpus, tmp_path / "cache")[0].made
    assert walk(corpus, [2], prepared=found(corpus, tmp_path / "cache")) == walk(corpus, [2])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_keys(path: Path) -> None:
    path.write_text('{"source": null}')


def saying(**values):
    """A damage: the manifest says other things."""

    def damage(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


def of_the_shard_before(path: Path) -> None:
    """All three files of another shard's entry, which fit each other."""
    names = [place.name for place in path.parent.parent.iterdir() if place.is_dir() and place != path.parent]
    for file in (path.parent.parent / names[0]).iterdir():
        shutil.copy(file, path.parent)
    saying(source=None)(path)  # as one of a hub, of which the identity says all


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (IDS, cut),
        (RECORDS, cut),
        (IDS, longer),
        (IDS, Path.unlink),
        (MANIFEST, cut),
        (MANIFEST, without_keys),
        (MANIFEST, saying(format=0)),
        (MANIFEST, saying(format=1)),
        (MANIFEST, saying(format=3)),
        (MANIFEST, saying(ids=">u2")),
        (MANIFEST, saying(ids="<i4")),
        (MANIFEST, saying(ids="nonsense")),
        (MANIFEST, saying(ids=[])),
        (MANIFEST, saying(sizes=[1])),
        (MANIFEST, saying(sizes={IDS: [1], RECORDS: [1]})),
        (MANIFEST, saying(sha256=[IDS, RECORDS])),
        (MANIFEST, of_the_shard_before),
    ],
)
def test_a_damaged_entry_is_noticed_named_and_made_anew(corpus, tmp_path, name, damage):
    plain = walk(corpus, [5] * 30)
    entry = prepare(corpus, tmp_path / "cache")[1].entry
    damage(entry.folder / name)
    entries = found(corpus, tmp_path / "cache")
    assert sorted(entries.entries) == [str(corpus.shards[0]), str(corpus.shards[2])]
    assert str(corpus.shards[1]) in entries.problems[0]
    assert "text is read instead" in entries.problems[0]
    assert walk(corpus, [5] * 30, prepared=entries) == plain
    assert [each.made for each in prepare(corpus, tmp_path / "cache")] == [False, True, False]
    assert found(corpus, tmp_path / "cache").problems == []


def test_an_entry_without_a_manifest_is_none(corpus, tmp_path):
    entry = prepare(corpus, tmp_path / "cache")[0].entry
    (entry.folder / MANIFEST).unlink()
    assert open_entry(entry.folder) is None
    assert prepare(corpus, tmp_path / "cache")[0].made


def test_records_that_are_damaged_without_a_change_of_size_are_noticed_when_they_are_opened(corpus, tmp_path):
    plain, lines = walk(corpus, [5] * 30), []
    entry = prepare(corpus, tmp_path / "cache")[0].entry
    flipped(entry.folder / RECORDS)
    entries = found(corpus, tmp_path / "cache", say=lines.append)
    assert walk(corpus, [5] * 30, prepared=entries) == plain
    assert "records.bin is damaged" in lines[0]


def test_an_entry_that_another_process_has_removed_meanwhile_is_no_error(corpus, tmp_path):
    entry = prepare(corpus, tmp_path / "cache")[0].entry
    prepared_writing.discard(entry)
    prepared_writing.discard(entry)
    assert not entry.folder.exists()


@pytest.mark.parametrize("place", [0.0, 0.5, 0.99])
def test_from_damaged_ids_on_the_text_is_read(corpus, tmp_path, place):
    plain, lines = walk(corpus, [5] * 30), []
    entry = prepare(corpus, tmp_path / "cache")[1].entry
    content = bytearray((entry.folder / IDS).read_bytes())
    content[int(place * len(content))] ^= 1
    (entry.folder / IDS).write_bytes(content)
    assert walk(corpus, [5] * 30, prepared=found(corpus, tmp_path / "cache", say=lines.append)) == plain
    assert "ids.bin is damaged" in lines[0]
    assert str(corpus.shards[1]) in lines[0]
    assert "data prepare --check` makes it anew" in lines[0]


def test_the_ids_of_the_other_side_are_not_read(tmp_path):
    corpus = write_shards(tmp_path / "corpus", [good(i) for i in range(700)], 1)
    entry = prepare(corpus, tmp_path / "cache")[0].entry
    records = np.fromfile(entry.folder / RECORDS, prepared_format.RECORD)
    ids = np.fromfile(entry.folder / IDS, entry.manifest.ids)
    for i in np.flatnonzero(records["kind"] == prepared_format.GOOD).tolist():
        ids[records["end"][i - 1] if i else 0 : records["end"][i]] += 1
    ids.tofile(entry.folder / IDS)
    held_out = Corpus(corpus.shards, part="validation")
    block = next(
        read_blocks(held_out, settings=settings(), prepared=found(corpus, tmp_path / "cache", say=pytest.fail))
    )
    assert block.labels == next(read_blocks(held_out, settings=settings())).labels != []
    assert not any(isinstance(text, str) for text in block.texts)


def test_ids_that_are_damaged_without_a_change_of_size_are_noticed_by_the_full_check(corpus, tmp_path):
    entry = prepare(corpus, tmp_path / "cache")[0].entry
    entry.check()
    flipped(entry.folder / IDS)
    with pytest.raises(ValueError, match=r"ids\.bin is damaged"):
        entry.check()


def test_a_place_where_no_document_ends_is_read_from_the_text(corpus, tmp_path):
    lines = []
    prepare(corpus, tmp_path / "cache")
    entries = found(corpus, tmp_path / "cache", say=lines.append)
    assert isinstance(entries.reader(corpus.shards[0], Position(2, 7)), ShardReader)
    assert "no document ends at line 2" in lines[0]


def test_the_type_of_ids_follows_the_vocabulary(corpus, tmp_path):
    assert [ids_type(size).str for size in (256, 65_536, 65_537)] == ["<u2", "<u2", "<i4"]

    class Large(WordTokenizer):
        vocab_size = 200_000

    prepare(corpus, tmp_path / "cache", tokenizer=Large())
    entries = found(corpus, tmp_path / "cache", Large())
    assert {entry.manifest.ids for entry in entries.entries.values()} == {"<i4"}
    takes = [5] * 30
    assert walk(corpus, takes, tokenizer=Large(), prepared=entries) == walk(corpus, takes, tokenizer=Large())


# Writing.


def test_an_entry_says_what_it_holds(odd_corpus, tmp_path):
    entries = [each.entry for each in prepare(odd_corpus, tmp_path / "cache")]
    totals = [entry.manifest.totals for entry in entries]
    records = [said(ShardReader(shard)) for shard in odd_corpus.shards]
    for total, entry, shard in zip(totals, entries, records, strict=True):
        documents = [each[1] for each in shard if each[0] == "Document"]
        assert total.documents == len(documents)
        assert total.tokens == sum(len(each[1]) for each in documents)
        assert (total.surrogates, total.bytes) == tuple(sum(each[i] for each in documents) for i in (2, 3))
        assert (total.bad, total.empty) == tuple(
            sum(each[0] == kind for each in shard) for kind in ("BadDocument", "EmptyDocument")
        )
        assert len(entry.manifest.reasons) == total.bad
    assert sum(total.bad for total in totals) >= 4
    assert 0 < totals[0].held_out == len(lengths_of(entries[0], "validation")) < totals[0].documents


def test_the_number_of_workers_does_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared_writing, "_BATCH_DOCUMENTS", 5)
    corpus = write_shards(tmp_path / "corpus", [good(i) for i in range(64)], 1)
    manifests = [prepare(corpus, tmp_path / f"{n}", workers=n)[0].entry.manifest for n in (0, 2)]
    assert manifests[0] == manifests[1]
    assert manifests[0].totals.documents == 64


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_leaves_nothing_of_the_shard_and_all_of_those_before(corpus, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(prepared_writing, "_BATCH_DOCUMENTS", 2)
    stop = []
    with Preparation(
        WordTokenizer(),
        tmp_path / "cache",
        workers=workers,
        should_stop=lambda: len(stop) > 9,
    ) as preparation:
        for shard, expectation in zip(corpus.shards, (nullcontext(), pytest.raises(StopRequested)), strict=False):
            with expectation:
                preparation.prepare(shard, lambda documents: stop.append(documents))
    assert active_children() == []
    folder = tokens_folder(tmp_path / "cache", WordTokenizer())
    assert [path.name for path in folder.iterdir() if not path.name.endswith(".lock")] == [
        next(iter(found(corpus, tmp_path / "cache").entries.values())).folder.name
    ]


def test_a_tokenizer_that_fails_or_lies_leaves_nothing(tmp_path):
    corpus = write_shards(tmp_path / "corpus", ['{"text": "poison"}'], 1)
    with pytest.raises(ValueError, match="on purpose"):
        prepare(corpus, tmp_path / "cache", tokenizer=FailingTokenizer())

    class Lying(WordTokenizer):
        @property
        def vocab_size(self):
            return 3

        def encode(self, texts):
            return [np.array([3], np.int32) for _ in texts]

    with pytest.raises(InputError, match="ids up to 3, and has 3 pieces"):
        prepare(corpus, tmp_path / "cache", tokenizer=Lying())
    assert list((tmp_path / "cache").rglob("*.bin")) == []


def test_a_file_that_changes_while_it_is_read_is_refused(corpus, tmp_path):
    def touch(documents: int) -> None:
        with corpus.shards[0].open("a") as file:
            file.write("\n")

    with pytest.raises(InputError, match="was changed while it was read"):
        prepare(corpus, tmp_path / "cache", which=slice(1), report=touch)
    assert found(corpus, tmp_path / "cache").entries == {}


def test_so_is_one_that_changes_between_its_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("blockllm_cli.data.shards.SAMPLED_BYTES", 4)
    corpus = write_shards(tmp_path / "corpus", ['{"text": "one two three"}', '{"text": "four"}'], 1)
    shard = corpus.shards[0]
    with pytest.raises(InputError, match="was changed while it was read"):
        prepare(corpus, tmp_path / "cache", report=lambda _: shard.write_text(shard.read_text().replace("two", "TWO")))
    assert found(corpus, tmp_path / "cache").entries == {}


def test_a_cache_that_cannot_be_written_is_an_error(corpus, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match="cannot write"):
        prepare(corpus, tmp_path / "cache")


def test_a_disk_that_fills_up_leaves_nothing(corpus, tmp_path, monkeypatch):
    def full(self, batch, made):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(prepared_writing._Writer, "add", full)
    with pytest.raises(StorageError, match="no space left"):
        prepare(corpus, tmp_path / "cache")
    monkeypatch.undo()
    assert list((tmp_path / "cache").rglob("*.bin")) == []
    assert len(prepare(corpus, tmp_path / "cache")) == 3


def test_a_copy_is_read_to_its_end_once(corpus, tmp_path, monkeypatch):
    prepare(corpus, tmp_path / "cache")
    for shard in corpus.shards:
        os.utime(shard, (1, 1))
    hashed = []
    real = prepared_format.file_sha256
    monkeypatch.setattr(prepared_format, "file_sha256", lambda path: hashed.append(path) or real(path))
    with Preparation(WordTokenizer(), tmp_path / "cache", workers=0) as preparation:
        assert all(preparation.find(shard) for shard in corpus.shards)
        assert hashed == list(corpus.shards)
    assert len(found(corpus, tmp_path / "cache").entries) == 3
    assert len(hashed) == 3


def test_two_that_want_the_same_shard_make_it_once(corpus, tmp_path, monkeypatch):
    """The lock is one of open files, so two threads stand for two processes."""
    results, is_inside, is_waiting = [], threading.Event(), threading.Event()
    real = prepared_writing.tokenise

    def slow(texts, encoder):
        is_inside.set()
        assert is_waiting.wait(60)
        return real(texts, encoder)

    def waited() -> bool:
        is_waiting.set()
        return False

    monkeypatch.setattr(prepared_writing, "tokenise", slow)
    first = threading.Thread(target=lambda: results.extend(prepare(corpus, tmp_path / "cache", which=slice(1))))
    first.start()
    assert is_inside.wait(60)
    [second] = prepare(corpus, tmp_path / "cache", which=slice(1), should_stop=waited)
    first.join(60)
    assert [second.made, results[0].made] == [False, True]
    assert second.entry == results[0].entry


def test_what_a_killed_process_left_is_removed(corpus, tmp_path):
    folder = prepare(corpus, tmp_path / "cache", which=slice(1))[0].entry.folder
    rest = folder.with_name(f".{folder.name}.99999.tmp")
    shutil.move(folder, rest)
    assert prepare(corpus, tmp_path / "cache", which=slice(1))[0].made
    assert not rest.exists()


# How far is far enough.


@pytest.mark.parametrize("layout", ["truncate", "pack"])
@pytest.mark.parametrize("block_documents", [1, 7, 39])
def test_rows_are_counted_from_lengths(corpus, tmp_path, layout, block_documents):
    keys = {"layout": layout, "block_documents": block_documents, "on_exhausted": "stop"}
    count = RowCount(settings(**keys))
    lengths = [lengths_of(each.entry, "all") for each in prepare(corpus, tmp_path / "cache")]
    for i in (1, 0, 2):
        count.add(lengths[i])
    assert count.documents == 39
    order = [corpus.shards[i] for i in (1, 0, 2)]
    texts = [text for shard in order for text in Corpus((shard,)).texts()]
    rows = targets = 0
    for begin in range(0, len(texts) - len(texts) % block_documents, block_documents):
        block = TextBlock(0, 0, Cursor(0, 0, 0), texts=texts[begin : begin + block_documents])
        block.labels = ["label"] * block_documents
        built = build_block(block, WordTokenizer(), settings(**keys)).rows
        rows, targets = rows + len(built), targets + int(built.targets_per_row().sum())
    assert (count.rows, count.targets) == (rows, targets)
