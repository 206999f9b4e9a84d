"""The place in the data is a place in one order of documents: nothing is lost, read twice or saved at length (R06)."""

import json

import pytest

from support.tiny import equal_rows

SHARDS, DOCUMENTS, BLOCK, ROWS = 4, 50, 20, 4


@pytest.fixture
def sets(tmp_path):
    """200 documents in 4 shards, one a row, shuffled in blocks of 20: 50 updates of 4 rows are one pass."""
    for shard in range(SHARDS):
        lines = [json.dumps({"text": f"the river of shard {shard} keeps letter {i}"}) for i in range(DOCUMENTS)]
        (tmp_path / f"part-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return (
        f"data.train={tmp_path}/part-*.jsonl",
        "data.layout=truncate",
        f"data.block_documents={BLOCK}",
        f"batch.rows={ROWS}",
        "schedule.steps=60",
        "evaluate.every=0",
    )


def documents(run):
    return [tuple(labels) for row in run.rows for labels in row["documents"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffled_stream_resumes_row_by_row_r06(tiny, sets, workers):
    sets = (*sets, f"data.workers={workers}")
    unbroken = tiny.run(*sets)
    cut = tiny.run(*sets, stop_after=15)
    assert len(documents(cut)) == 60
    resumed = tiny.run(*sets, resume=cut.folder)
    assert documents(resumed) == documents(unbroken)
    equal_rows(resumed.metrics, unbroken.metrics)
    first_pass = documents(resumed)[: SHARDS * DOCUMENTS]
    assert len(set(first_pass)) == SHARDS * DOCUMENTS  # each once, none left out
    assert len(set(documents(resumed)[SHARDS * DOCUMENTS :])) == 60 * ROWS - SHARDS * DOCUMENTS


def test_the_position_is_a_few_hundred_bytes_wherever_it_stands_r06(tiny, sets):
    sizes = []
    for step in (1, 15, 49, 51):
        run = tiny.run(*sets, stop_after=step)
        (checkpoint,) = (run.folder / "checkpoints").glob("step-*")
        sizes.append(len(json.dumps(json.loads((checkpoint / "state.json").read_text())["data"])))
    assert max(sizes) < 600
    assert max(sizes) - min(sizes) < 40


def test_documents_move_no_further_than_the_documented_radius_r06(tiny, sets):
    order = [label for labels in documents(tiny.run(*sets)) for label in labels][: SHARDS * DOCUMENTS]
    shards = list(dict.fromkeys(label.partition(":")[0] for label in order))
    places = [shards.index(label.partition(":")[0]) * DOCUMENTS + int(label.partition(":")[2]) - 1 for label in order]
    assert all(abs(place - position) < BLOCK for position, place in enumerate(places))
    assert places != sorted(places)
