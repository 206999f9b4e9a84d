"""The stream of rows: one order, exact positions, clear ends."""

import hashlib
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from small_streams import good, labels_of, settings, taken, walk, write_shards
from word_tokenizer import WordTokenizer

from blockllm_cli.data import prefetch, reader
from blockllm_cli.data.corpus import Corpus
from blockllm_cli.data.rows import Rows
from blockllm_cli.data.stream import RowStream, rows_digest, validation_rows
from blockllm_cli.errors import InputError, StopRequested

PATIENCE_SECONDS = 60


# The same rows.


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_workers_gives_the_same_rows(tmp_path, count):
    """R22: 1 and 3 shards; workers 0, 1, 4 (and 3): same ids per step, each id once per pass."""
    corpus = write_shards(tmp_path, [good(i) for i in range(50)], count)
    runs = [walk(corpus, [4] * 60, workers=workers, layout="truncate") for workers in (0, 1, 3, 4)]
    assert runs[1:] == runs[:1] * 3
    labels = labels_of(runs[0])
    assert len(labels) == 240
    for epoch in range(4):
        assert len(set(labels[50 * epoch : 50 * (epoch + 1)])) == 50


def test_packed_rows_are_the_same_for_workers_and_for_any_take(corpus):
    one = walk(corpus, [1] * 240)
    assert walk(corpus, [1] * 240, workers=2) == one
    by_seven = walk(corpus, [7] * 34)
    assert [row for part in by_seven for row in part[0]] == [row for part in one for row in part[0]][:238]
    assert by_seven[-1][4] == one[237][4]


def test_epochs_differ_in_order_and_not_in_documents(corpus):
    rows = walk(corpus, [1] * 150, layout="truncate")
    labels = labels_of(rows)
    epochs = [labels[39 * i : 39 * (i + 1)] for i in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert {frozenset(epoch) for epoch in epochs} == {frozenset(epochs[0])}
    assert len(set(epochs[0])) == 39
    assert [(i, event) for i, row in enumerate(rows) for event in row[3] if event["kind"] == "epoch"] == [
        (39 * n, {"kind": "epoch", "epoch": n}) for n in (1, 2, 3)
    ]


def test_another_seed_is_another_order_of_the_same_documents(corpus):
    one, two = (labels_of(walk(corpus, [39], layout="truncate", seed=seed)) for seed in (0, 2**63 - 1))
    assert one != two
    assert sorted(one) == sorted(two)


# Positions.


@pytest.mark.parametrize("layout", ["truncate", "pack"])
def test_resume_at_every_row_is_exact_across_epochs(corpus, layout):
    """R06: rows, events, positions and counts after a resume are those of the unbroken stream."""
    total = 95 if layout == "truncate" else 135
    whole = walk(corpus, [1] * total, layout=layout)
    assert whole[-1][4]["epoch"] >= 2
    for i in range(0, total - 1):
        state = json.loads(json.dumps(whole[i][4]))
        ahead = min(45, total - i - 1)
        assert walk(corpus, [1] * ahead, state=state, layout=layout) == whole[i + 1 : i + 1 + ahead], i


def test_resume_with_other_workers_is_exact(corpus):
    whole = walk(corpus, [5] * 40)
    for i, workers in ((3, 1), (17, 3), (26, 0)):
        assert walk(corpus, [5] * (39 - i), state=whole[i][4], workers=workers) == whole[i + 1 :]


def test_a_shuffled_stream_loses_and_repeats_nothing_at_a_resume(tmp_path):
    """R06: 200 documents in 4 shards, the state taken after 60 of them."""
    corpus = write_shards(tmp_path, [good(i) for i in range(200)], 4)
    keys = {"layout": "truncate", "block_documents": 20}
    whole = labels_of(walk(corpus, [200], **keys))
    with RowStream(corpus, WordTokenizer(), settings=settings(**keys)) as stream:
        first = labels_of(taken(stream, [60]))
        state = stream.state()
    assert first + labels_of(walk(corpus, [140], state=state, **keys)) == whole
    assert len(set(whole)) == 200
    assert len(json.dumps(state)) < 500


def test_what_was_consumed_is_not_parsed_again(tmp_path, monkeypatch):
    corpus = write_shards(tmp_path, [good(i) for i in range(700)], 1)
    state = walk(corpus, [640], layout="truncate")[0][4]
    parsed = []
    real = reader._parsed
    monkeypatch.setattr(reader, "_parsed", lambda line, number: parsed.append(number) or real(line, number))
    walk(corpus, [1], layout="truncate", state=state)
    assert min(parsed) == 638  # the block that row 640 is in begins after 91 blocks of 7


def test_the_beginning_is_a_position_too(corpus):
    with RowStream(corpus, WordTokenizer(), settings=settings()) as stream:
        state = stream.state()
    assert walk(corpus, [9] * 5, state=state) == walk(corpus, [9] * 5)


def test_other_files_than_those_of_the_position_are_refused(corpus):
    state = walk(corpus, [3])[0][4]
    with corpus.shards[0].open("a") as file:
        file.write("\n" + good(99))
    with pytest.raises(InputError, match="not those of the checkpoint"):
        RowStream(corpus, WordTokenizer(), settings=settings(), state=state)


def test_a_position_that_the_files_no_longer_have_is_refused(tmp_path, monkeypatch):
    """Size and ends of the files are the same, the text between is not."""
    monkeypatch.setattr("blockllm_cli.data.shards.SAMPLED_BYTES", 0)
    corpus = write_shards(tmp_path, ['{"text": "a b c d e f g h i j k l m n"}', '{"text": "o"}'], 1)
    state = walk(corpus, [3], block_documents=1)[0][4]
    assert state["row"] == 3
    corpus.shards[0].write_text(
        corpus.shards[0].read_text().replace(" b c d e f g h i j k l", "bbccddeeffgghhiijjkkll")
    )
    with pytest.raises(InputError, match="stands at row 3 of a block that has 1 rows now"):
        walk(corpus, [1], state=state, block_documents=1)


# Bad documents.


def test_bad_documents_are_named_once_and_counted_once(corpus):
    """R25: each is an event with file, line and reason, in the first pass only; empty ones are counted apart."""
    rows = walk(corpus, [1] * 200)
    events = [event for row in rows for event in row[3]]
    bad = [event for event in events if event["kind"] == "bad_document"]
    assert [event["kind"] for event in events].count("epoch") >= 2
    assert sorted((Path(event["file"]).name, event["line"]) for event in bad) == [
        ("s0.jsonl", 1),
        ("s0.jsonl", 15),
        ("s2.jsonl", 7),
    ]
    assert any("`text` is null" in event["reason"] for event in bad)
    assert rows[-1][4]["counts"] == {
        "documents": 39,
        "rows": rows[-1][4]["counts"]["rows"],
        "bad": 3,
        "empty": 2,
        "without_target": 0,
        "surrogates": 1,
    }


def test_bad_documents_above_the_limit_are_an_error_that_names_the_last(corpus):
    assert len(walk(corpus, [1] * 200, max_bad_documents=3)) == 200
    with pytest.raises(InputError) as caught:
        walk(corpus, [1] * 200, max_bad_documents=2)
    message = str(caught.value)
    assert "3 bad documents" in message
    assert "data.max_bad_documents = 2" in message
    assert str(corpus.shards[0].parent) in message
    assert ", line " in message


def test_the_limit_holds_over_a_resume(corpus):
    whole = walk(corpus, [1] * 10, max_bad_documents=2)
    assert whole[-1][4]["counts"]["bad"] >= 1
    with pytest.raises(InputError, match="3 bad documents"):
        walk(corpus, [1] * 200, max_bad_documents=2, state=whole[-1][4])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corpus_without_a_usable_row_is_an_error_with_counts(tmp_path, workers):
    corpus = write_shards(tmp_path, ['{"text": " "}', "broken", '{"text": ""}'], 1)
    with pytest.raises(InputError, match=r"no usable row: 0 good documents.* 2 empty and 1 bad"):
        walk(corpus, [1], workers=workers)


def test_documents_without_a_target_are_skipped_and_counted(tmp_path):
    corpus = write_shards(tmp_path, [good(i) for i in range(5)], 1)
    with pytest.raises(InputError, match="5 good documents, of which 5 have no target"):
        walk(corpus, [1], layout="truncate", sequence_length=1)


# Ends and stops.


def test_on_exhausted_stop_drops_what_does_not_fill_a_take(corpus):
    keys = {"layout": "truncate", "on_exhausted": "stop"}
    with RowStream(corpus, WordTokenizer(), settings=settings(**keys)) as stream:
        given = taken(stream, [10] * 3)
        state = stream.state()
        assert stream.events_at_end == []
        assert stream.take(10) is None
        at_end = stream.events_at_end
        assert at_end[-1] == {"kind": "exhausted", "rows_dropped": 9}
        assert stream.take(10) is None
        assert stream.events_at_end == at_end
        assert stream.state() == state
    named = [event for row in given for event in row[3]] + at_end[:-1]
    assert [event["kind"] for event in named] == ["bad_document"] * 3
    with RowStream(corpus, WordTokenizer(), settings=settings(**keys), state=state) as stream:
        assert stream.take(10) is None
        assert stream.events_at_end == at_end


def test_on_exhausted_stop_gives_a_last_full_take(corpus):
    with RowStream(corpus, WordTokenizer(), settings=settings(layout="truncate", on_exhausted="stop")) as stream:
        taken(stream, [13] * 3)
        assert stream.take(13) is None
        assert stream.events_at_end[-1] == {"kind": "exhausted", "rows_dropped": 0}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_returns_control_and_loses_nothing(corpus, workers):
    stop = False
    whole = walk(corpus, [50] * 4)
    with RowStream(corpus, WordTokenizer(), settings=settings(workers=workers), should_stop=lambda: stop) as stream:
        first = taken(stream, [50])
        stop = True
        with pytest.raises(StopRequested):
            stream.take(50)
        assert stream.state() == first[0][4]
        stop = False
        assert first + taken(stream, [50] * 3) == whole


def test_a_stop_is_noticed_while_a_block_is_long_in_coming(corpus, monkeypatch):
    asked = threading.Event()

    def never_ready(*_, should_stop, **__):
        asked.set()
        while not should_stop():
            time.sleep(0.01)
        raise StopRequested
        yield

    monkeypatch.setattr(prefetch, "read_blocks", never_ready)
    with (
        RowStream(corpus, WordTokenizer(), settings=settings(), should_stop=asked.is_set) as stream,
        pytest.raises(StopRequested),
    ):
        stream.take(1)


# The validation set.


@pytest.mark.parametrize("layout", ["truncate", "pack"])
def test_validation_rows_are_the_first_with_enough_targets(corpus, layout):
    keys = settings(layout=layout)
    everything = validation_rows(corpus, WordTokenizer(), keys, 10**6)
    per_row = everything.targets_per_row()
    for tokens in range(1, int(per_row.sum()) + 1):
        rows = validation_rows(corpus, WordTokenizer(), keys, tokens)
        assert rows.pieces.tolist() == everything.pieces[: len(rows)].tolist()
        assert rows.labels == everything.labels[: len(rows)]
        assert rows.targets_per_row().sum() >= tokens > per_row[: len(rows) - 1].sum()


def test_validation_rows_depend_on_no_seed_and_are_not_tokenised_to_the_end(corpus):
    class Counting(WordTokenizer):
        texts = 0

        def encode(self, texts):
            self.texts += len(texts)
            return super().encode(texts)

    counting = Counting()
    rows = [
        validation_rows(corpus, counting, settings(seed=seed, on_exhausted=end, block_documents=39), 40)
        for seed, end in ((0, "repeat"), (9, "stop"))
    ]
    assert rows[0].pieces.tolist() == rows[1].pieces.tolist()
    assert rows[0].sequence_length == 6
    assert isinstance(rows[0], Rows)


def test_a_validation_set_that_is_too_small_is_used_and_reported(corpus):
    events = []
    rows = validation_rows(corpus, WordTokenizer(), settings(), 10**6, report=events.append)
    assert events[-1] == {
        "kind": "validation_short",
        "targets": int(rows.targets_per_row().sum()),
        "wanted": 10**6,
    }
    assert [event["kind"] for event in events[:-1]] == ["bad_document"] * 3


def test_bad_documents_of_shared_files_are_left_to_the_training_stream(tmp_path):
    files = write_shards(tmp_path, ["broken", *(good(i) for i in range(200))], 1)
    events = []
    validation_rows(Corpus(files.shards, "validation"), WordTokenizer(), settings(), 1, report=events.append)
    assert events == []


def test_validation_errors(tmp_path, corpus):
    few = write_shards(tmp_path / "few", ['{"text": "one"}', "broken"], 1)
    with pytest.raises(InputError, match=r"the validation data have no usable row: 0 good documents.*1 bad.*in 20"):
        validation_rows(Corpus(few.shards, "validation"), WordTokenizer(), settings(), 10)
    with pytest.raises(InputError, match=r"data\.max_bad_documents = 2"):
        validation_rows(corpus, WordTokenizer(), settings(max_bad_documents=2), 10**6)
    with pytest.raises(StopRequested):
        validation_rows(corpus, WordTokenizer(), settings(), 10, should_stop=lambda: True)


def test_the_digest_is_the_documented_one(corpus):
    with RowStream(corpus, WordTokenizer(), settings=settings()) as stream:
        rows = [stream.take(3).rows, stream.take(4).rows]
    assert any((part.pieces == -1).any() for part in rows) or rows[0].pieces.dtype == np.int32
    expected = b""
    for part in rows:
        flat = b"".join(int(piece).to_bytes(4, "little", signed=True) for row in part.pieces for piece in row)
        expected = hashlib.sha256(expected + flat).digest()
    assert rows_digest(rows_digest(b"", rows[0]), rows[1]) == expected
