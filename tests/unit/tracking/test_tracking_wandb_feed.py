"""Rows of a file that another process is writing."""

import json

from blockllm_cli.durable import write_text
from blockllm_cli.tracking.wandb_feed import RowFeed


def steps(feed):
    return [row["step"] for row in feed.new()]


def test_each_row_comes_once_and_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    feed = RowFeed(path)
    assert steps(feed) == []
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 0}\n{"step": 1, "a"')
        file.flush()
        assert steps(feed) == [0]
        assert steps(feed) == []
        file.write(": 2}\n")
        file.flush()
        assert list(feed.new()) == [{"step": 1, "a": 2}]
    feed.close()


def test_a_file_that_was_replaced_or_shortened_is_read_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in range(5)]
    path.write_text("".join(lines), encoding="utf-8")
    feed = RowFeed(path)
    assert steps(feed) == [0, 1, 2, 3, 4]
    write_text(path, "".join(lines[:4]))
    assert steps(feed) == [0, 1, 2, 3]
    path.write_text("".join(lines[:2]), encoding="utf-8")
    assert steps(feed) == [0, 1]
    feed.close()


def test_what_is_no_row_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n\xff\xfe\n[1]\n{"step": "1"}\n{"step": true}\n{broken\n{"step": 2}\n')
    feed = RowFeed(path)
    assert steps(feed) == [0, 2]
    feed.close()
