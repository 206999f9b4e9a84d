"""The order of documents: permutations, blocks, and where a block begins."""

import json
from pathlib import Path

import pytest
from word_tokenizer import WordTokenizer

from blockllm_cli.data.blocks import (
    Cursor,
    StreamSettings,
    build_block,
    document_order,
    read_blocks,
    shard_order,
)
from blockllm_cli.data.corpus import Corpus
from blockllm_cli.errors import StopRequested


def settings(**keys) -> StreamSettings:
    return StreamSettings(**{"seed": 3, "sequence_length": 8, "layout": "pack", "block_documents": 4, **keys})


def shards(folder: Path, *lines: list[str]) -> Corpus:
    paths = []
    for i, shard in enumerate(lines):
        paths.append(folder / f"s{i}.jsonl")
        paths[-1].write_text("\n".join(shard))
    return Corpus(tuple(paths))


def good(number: int) -> str:
    return json.dumps({"text": f"document {number} ends"})


def test_orders_are_permutations_keyed_by_seed_epoch_and_block():
    orders = {
        tuple(document_order(50, seed, epoch, block)) for seed in (0, 1) for epoch in (0, 1) for block in (0, 1)
    } | {tuple(shard_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 12
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert document_order(50, 2**62, 1, 1) == document_order(50, 2**62, 1, 1)


def test_orders_are_those_of_earlier_versions():
    """Recorded: a run must find its rows again under another numpy or another version of this program."""
    assert shard_order(8, 0, 0) == [0, 3, 7, 5, 1, 2, 6, 4]
    assert document_order(8, 0, 0, 0) == [3, 7, 4, 2, 1, 6, 5, 0]
    assert document_order(8, 7, 2, 5) == [4, 5, 0, 3, 2, 6, 1, 7]


def test_blocks_cross_shards_in_the_permuted_order(tmp_path):
    corpus = shards(tmp_path, *([good(10 * i + j) for j in range(3)] for i in range(5)))
    blocks = list(read_blocks(corpus, settings=settings(), epoch=1))
    order = shard_order(5, 3, 1)
    assert order != list(range(5))
    labels = [f"s{i}.jsonl:{j + 1}" for i in order for j in range(3)]
    assert [block.labels for block in blocks] == [labels[:4], labels[4:8], labels[8:12], labels[12:]]
    assert [(block.epoch, block.index, block.is_last) for block in blocks] == [
        (1, 0, False),
        (1, 1, False),
        (1, 2, False),
        (1, 3, True),
    ]


def test_reading_from_the_start_of_any_block_gives_the_same_blocks(tmp_path):
    corpus = shards(
        tmp_path,
        ["broken", *(good(i) for i in range(7)), '{"text": ""}', "broken"],
        [],
        [good(20), "broken", '{"text": "\\ud800 x"}', *(good(i) for i in range(21, 26))],
        ["broken"],
    )
    for epoch in range(4):
        whole = list(read_blocks(corpus, settings=settings(), epoch=epoch))
        assert len(whole) == 4
        assert sum(len(block.bad) for block in whole) == 5
        assert (sum(block.empty for block in whole), sum(block.surrogates for block in whole)) == (1, 1)
        for i, block in enumerate(whole):
            again = read_blocks(corpus, settings=settings(), epoch=epoch, index=i, start=block.start)
            assert list(again) == whole[i:]


def test_what_follows_the_last_full_block_belongs_to_a_last_one_without_documents(tmp_path):
    corpus = shards(tmp_path, [*(good(i) for i in range(4)), "broken"])
    first, last = read_blocks(corpus, settings=settings())
    assert (len(first.texts), first.bad, first.is_last) == (4, [], False)
    assert (len(last.texts), len(last.bad), last.is_last) == (0, 1, True)
    assert last.start[:2] == (0, 4)
    file, document = last.bad[0]
    assert (file, document.line) == (str(tmp_path / "s0.jsonl"), 5)
    assert len(build_block(last, WordTokenizer(), settings()).rows) == 0


def test_a_file_of_nothing_but_bad_documents_is_not_read_to_its_end(tmp_path):
    corpus = shards(tmp_path, ["broken"] * 1000)
    (block,) = read_blocks(corpus, settings=settings(max_bad_documents=5))
    assert len(block.bad) == 6


def test_a_block_is_built_in_its_permuted_order(tmp_path):
    corpus = shards(tmp_path, [good(i) for i in range(4)])
    block = next(iter(read_blocks(corpus, settings=settings())))
    built = build_block(block, WordTokenizer(), settings(layout="truncate"))
    assert [labels[0] for labels in built.rows.labels] == [block.labels[i] for i in document_order(4, 3, 0, 0)]
    assert (built.documents, built.without_target) == (4, 0)
    by_label = dict(zip(block.labels, WordTokenizer().encode(block.texts), strict=True))
    for pieces, (label,) in zip(built.rows.pieces, built.rows.labels, strict=True):
        assert pieces[:3].tolist() == by_label[label].tolist()


def test_documents_that_tokenise_to_nothing_are_counted(tmp_path):
    class Picky(WordTokenizer):
        def encode(self, texts):
            return super().encode(["" if "document 2" in text else text for text in texts])

    block = next(iter(read_blocks(shards(tmp_path, [good(i) for i in range(4)]), settings=settings())))
    built = build_block(block, Picky(), settings())
    assert (built.documents, built.without_target) == (4, 1)


def test_only_the_side_of_the_split_is_in_blocks(tmp_path):
    corpus = shards(tmp_path, [good(i) for i in range(300)])
    sides = [Corpus(corpus.shards, part) for part in ("train", "validation")]
    labels = [{label for block in read_blocks(side, settings=settings()) for label in block.labels} for side in sides]
    assert labels[0] | labels[1] == {f"s0.jsonl:{i + 1}" for i in range(300)}
    assert not labels[0] & labels[1]
    assert labels[1]


def test_building_can_be_stopped(tmp_path):
    block = next(iter(read_blocks(shards(tmp_path, [good(1)]), settings=settings())))
    with pytest.raises(StopRequested):
        build_block(block, WordTokenizer(), settings(), should_stop=lambda: True)


def test_no_blocks_before_the_start(tmp_path):
    corpus = shards(tmp_path, [good(1)], [good(2)])
    order = shard_order(2, 3, 0)
    (block,) = read_blocks(corpus, settings=settings(), index=7, start=Cursor(1, 0, 0))
    assert (block.index, block.labels) == (7, [f"s{order[1]}.jsonl:1"])
