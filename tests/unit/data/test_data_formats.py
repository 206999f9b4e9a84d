"""Zstandard, parquet, and reading on from a position in every format."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from small_shards import bad, lines_of, outcome, texts

from blockllm_cli.data.reader import Position, ShardReader
from blockllm_cli.data.records import BadDocument, Document, EmptyDocument
from blockllm_cli.errors import InputError


def test_zstandard_frames_are_read_by_their_content(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    compress = zstandard.ZstdCompressor(write_checksum=True).compress
    first, second = compress(b"\n".join(lines_of(5)) + b"\n"), compress(b"\n".join(lines_of(3, 5)))
    file = tmp_path / "misnamed.json.gz"
    file.write_bytes(first + second)
    assert texts(file) == [json.loads(line)["text"] for line in lines_of(8)]
    file.write_bytes(first + second[:-20])
    assert outcome(file)[1] == 1
    assert "cut short" in bad(file)[0][1]
    file.write_bytes(first + second[:-1] + b"\0")
    assert outcome(file)[:2] == (5, 1)
    assert "damaged zstandard data" in bad(file)[0][1]


def test_zstandard_with_a_long_window_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)  # as `zstd --long=28` writes it
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    file = tmp_path / "long.jsonl.zst"
    file.write_bytes(stream.compress(b"\n".join(lines_of(5))) + stream.flush())
    assert outcome(file) == (5, 0, 0, 0)


def test_zstandard_without_its_package_is_one_clear_error(tmp_path, monkeypatch):
    file = tmp_path / "shard.zst"
    file.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match=r"shard\.zst.*pip install zstandard"):
        list(ShardReader(file))


def write_parquet(path: Path, column, name: str = "text", **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({name: column, "url": ["u"] * len(column)}), path, **options)


def test_parquet_rows_are_documents(tmp_path):
    file = tmp_path / "rows.parquet"
    write_parquet(file, ["one", None, "", "two"])
    assert list(ShardReader(file)) == [
        Document(1, "one", 0),
        BadDocument(2, "`text` is null"),
        EmptyDocument(3),
        Document(4, "two", 0),
    ]


def test_parquet_without_a_text_column_is_one_bad_document(tmp_path):
    file = tmp_path / "rows.parquet"
    write_parquet(file, ["one"], name="content")
    assert bad(file) == [(0, "no column `text` (columns: content, url); the file is left out")]
    write_parquet(file, [1, 2])
    assert bad(file) == [(0, "the column `text` is of type int64, not string; the file is left out")]


def test_damaged_parquet_is_a_bad_document(tmp_path):
    file = tmp_path / "rows.parquet"
    write_parquet(file, [f"text {i}" for i in range(100)])
    file.write_bytes(file.read_bytes()[:-30])
    assert outcome(file) == (0, 1, 0, 0)
    assert "damaged parquet" in bad(file)[0][1]


def test_parquet_without_its_package_is_one_clear_error(tmp_path, monkeypatch):
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"PAR1" + bytes(20))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"rows\.parquet.*pip install pyarrow"):
        list(ShardReader(file))


def write_arrow(path: Path, texts: list, name: str = "text"):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({name: texts, "url": ["u"] * len(texts)})
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def test_arrow_rows_are_documents(tmp_path):
    file = tmp_path / "rows.arrow"
    write_arrow(file, ["one", None, "", "two"])
    assert list(ShardReader(file)) == [
        Document(1, "one", 0),
        BadDocument(2, "`text` is null"),
        EmptyDocument(3),
        Document(4, "two", 0),
    ]


def test_arrow_without_text_or_damaged_is_bad(tmp_path):
    file = tmp_path / "rows.arrow"
    write_arrow(file, ["one"], name="content")
    assert bad(file) == [(0, "no column `text` (columns: content, url); the file is left out")]
    write_arrow(file, [1, 2])
    assert bad(file) == [(1, "`text` is not a string"), (2, "`text` is not a string")]
    write_arrow(file, [f"text {i}" for i in range(100)])
    file.write_bytes(file.read_bytes()[:200])
    assert outcome(file) == (0, 1, 0, 0)
    assert "damaged arrow data" in bad(file)[0][1]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "txt.gz", "parquet", "arrow"])
def test_reading_goes_on_from_every_position(tmp_path, kind):
    file = tmp_path / f"shard.{kind}"
    count = 12
    if kind == "parquet":
        write_parquet(file, [None if i == 5 else f"text {i}" for i in range(count)], row_group_size=5)
    elif kind == "arrow":
        write_arrow(file, [f"text {i}" for i in range(count)])
    else:
        lines = [*lines_of(4), b'{"text": broken', b"", *lines_of(6, 4)]
        if kind.startswith("txt"):
            lines = [line for i in range(count) for line in (b"text %d" % i, b"second line", *[b""] * (1 + i % 3))]
        data = b"\n".join(lines)
        if kind.endswith("gz"):
            data = gzip.compress(data)
        if kind.endswith("zst"):
            data = pytest.importorskip("zstandard").compress(data)
        file.write_bytes(data)
    whole, positions = [], []
    walk = ShardReader(file)
    for record in walk:
        whole.append(record)
        positions.append(walk.position)
    assert len(whole) >= 11
    for i, position in enumerate(positions):
        assert list(ShardReader(file, position)) == whole[i + 1 :], position


def test_parquet_rows_before_a_position_are_not_decoded(tmp_path, monkeypatch):
    file = tmp_path / "shard.parquet"
    write_parquet(file, [f"text {i}" for i in range(20)], row_group_size=5)
    from pyarrow import parquet

    groups = []
    real = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile,
        "iter_batches",
        lambda self, **keys: groups.append(keys["row_groups"]) or real(self, **keys),
    )
    assert [record.line for record in ShardReader(file, Position(11, 11))] == list(range(12, 21))
    assert groups == [[2, 3]]
