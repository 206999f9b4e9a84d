"""Several processes that train together: each walks the same blocks and keeps its share of every update's rows."""

import json
import os
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
from small_streams import good, settings, walk, write_shards
from word_tokenizer import WordTokenizer

from blockllm_cli.data import reader
from blockllm_cli.data.corpus import Corpus
from blockllm_cli.data.decompress import decompressed
from blockllm_cli.data.prepared import NOTHING_PREPARED, find_prepared
from blockllm_cli.data.prepared_writing import Preparation
from blockllm_cli.data.stream import RowStream, rank_share

PATIENCE_SECONDS = 120

RANK = """
import json, sys
from pathlib import Path
from small_streams import settings
from word_tokenizer import WordTokenizer
from blockllm_cli.data.corpus import Corpus
from blockllm_cli.data.prepared import find_prepared
from blockllm_cli.data.stream import RowStream
if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    corpus = Corpus(tuple(Path(name) for name in asked["shards"]))
    prepared = find_prepared(corpus.shards, WordTokenizer(), Path(asked["cache"]))
    keys = settings(workers=asked["workers"], on_exhausted=asked["end"])
    with RowStream(
        corpus, WordTokenizer(), settings=keys, prepared=prepared, rank=asked["rank"], world_size=asked["world_size"]
    ) as stream:
        found = []
        while len(found) < asked["takes"]:
            taken = stream.take(asked["rows"])
            if taken is None:
                found.append(stream.events_at_end)
                break
            own = stream.own(taken.rows)
            found.append([own.pieces.tolist(), own.labels, taken.events, stream.state()])
    print(json.dumps(found))
"""


@pytest.fixture
def ranks(tmp_path):
    """Reads with every rank in a process of its own, all at once; gives what each printed."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)

    def start(corpus: Corpus, world_size: int, workers: int, takes=12, rows=7, end="repeat") -> list[list]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        asked = {
            "shards": [str(shard) for shard in corpus.shards],
            "cache": str(tmp_path / "cache"),
            "world_size": world_size,
            "workers": workers,
            "takes": takes,
            "rows": rows,
            "end": end,
        }
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), json.dumps({**asked, "rank": rank})],
                env=environment,
                stdout=subprocess.PIPE,
            )
            for rank in range(world_size)
        ]
        outputs = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * world_size
        return [json.loads(output) for output in outputs]

    return start


def joined(found: list[list]) -> list[list]:
    """Takes of all ranks as one rank gives them; what is not rows must be the same on all."""
    takes = []
    for parts in zip(*found, strict=True):
        assert all(part[2:] == parts[0][2:] for part in parts)
        takes.append([*(list(chain.from_iterable(part[i] for part in parts)) for i in (0, 1)), *parts[0][2:]])
    return takes


@pytest.mark.parametrize(("world_size", "workers"), [(1, 4), (2, 0), (3, 1)])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_rows_of_all_ranks_are_those_of_one(tmp_path, ranks, shards, world_size, workers):
    """R08, R22: 1 and 3 shards; 1, 2 and 3 ranks in processes of their own; workers 0, 1, 4; 7 rows do not divide."""
    corpus = write_shards(tmp_path / "corpus", ["broken", *(good(i) for i in range(50))], shards)
    whole = [
        [pieces, [list(each) for each in labels], events, state]
        for pieces, _, labels, events, state in walk(corpus, [7] * 12)
    ]
    if workers == 0:  # and some shards prepared
        with Preparation(WordTokenizer(), tmp_path / "cache", workers=0) as preparation:
            preparation.prepare(corpus.shards[0])
    assert joined(ranks(corpus, world_size, workers)) == whole


def test_ranks_end_together(tmp_path, ranks):
    """R22: 5 rows on 2 processes end without a hang."""
    corpus = write_shards(tmp_path / "corpus", [json.dumps({"text": "a b c d"})] * 5, 1)
    found = ranks(corpus, 2, 1, rows=2, end="stop")
    assert [len(each) for each in found] == [3, 3]
    assert found[0][-1] == found[1][-1] == [{"kind": "exhausted", "rows_dropped": 1}]
    assert [[len(take[0]) for take in each[:-1]] for each in found] == [[1, 1], [1, 1]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_shares_are_all_rows_in_order_and_differ_by_one_at_most(world_size):
    for count in range(12):
        shares = [list(range(count))[rank_share(count, rank, world_size)] for rank in range(world_size)]
        assert list(chain.from_iterable(shares)) == list(range(count))
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_a_checkpoint_of_two_ranks_goes_on_with_any_number(corpus):
    """R08: the position is rows consumed, the same on every rank."""
    whole = walk(corpus, [6] * 10)
    states = []
    for rank in range(2):
        with RowStream(corpus, WordTokenizer(), settings=settings(), rank=rank, world_size=2) as stream:
            for _ in range(4):
                stream.take(6)
            states.append(stream.state())
    assert states[0] == states[1] == whole[3][4]
    for world_size in (1, 2, 3, 7):
        parts = []
        for rank in range(world_size):
            with RowStream(
                corpus, WordTokenizer(), settings=settings(), state=states[0], rank=rank, world_size=world_size
            ) as stream:
                parts.append([stream.own(stream.take(6).rows).pieces for _ in range(6)])
        together = [np.concatenate(shares).tolist() for shares in zip(*parts, strict=True)]
        assert together == [take[0] for take in whole[4:]]


# What a resume reads.


@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_resume_reads_at_most_one_block_again(tmp_path, monkeypatch, is_prepared):
    """Bytes and documents before the position are counted: those of the block in progress, and none before it."""
    corpus = write_shards(tmp_path / "corpus", [good(i) for i in range(700)], 1)
    prepared = NOTHING_PREPARED
    if is_prepared:
        with Preparation(WordTokenizer(), tmp_path / "cache", workers=0) as preparation:
            preparation.prepare(corpus.shards[0])
        prepared = find_prepared(corpus.shards, WordTokenizer(), tmp_path / "cache")
    size = corpus.shards[0].stat().st_size
    whole = walk(corpus, [10] * 70, layout="truncate")
    for number in (0, 20, 63):
        state = whole[number][4]
        texts, tokenised = [], []
        with monkeypatch.context() as patch:
            patch.setattr(reader, "decompressed", counting(texts))
            patch.setattr(WordTokenizer, "encode", recording(tokenised))
            rest = walk(corpus, [10], layout="truncate", state=state, prepared=prepared)
        assert rest == [whole[number + 1]]
        if is_prepared:
            assert (texts, tokenised) == ([], [])
            continue
        first = state["block"] * 7
        assert 0 <= state["row"] + first - 10 * (number + 1) < 7
        assert sum(texts) == size - state["cursor"][2]
        assert min(int(text.split()[0].removeprefix("number")) for text in tokenised) == first


def counting(found: list[int]):
    def pieces(*arguments):
        for piece in decompressed(*arguments):
            found.append(len(piece))
            yield piece

    return pieces


def recording(found: list[str]):
    real = WordTokenizer.encode

    def encode(self, texts):
        found.extend(texts)
        return real(self, texts)

    return encode
