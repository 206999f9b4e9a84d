"""The tolerant reader: what it yields of sound, odd and damaged files (R25)."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_shards import bad, lines_of, outcome, texts

from blockllm_cli.data import decompress, reader
from blockllm_cli.data.reader import Position, ShardReader
from blockllm_cli.data.records import Document, EmptyDocument
from blockllm_cli.errors import InputError, StopRequested

# Good documents, bad ones, empty ones, surrogates replaced.
AWKWARD = {
    "good-control": (40, 0, 0, 0),
    "truncated": (23, 1, 0, 0),
    "corrupt-byte": (21, 4, 0, 0),
    "invalid-json-line": (9, 1, 0, 0),
    "missing-text": (8, 2, 0, 0),
    "text-not-a-string": (9, 1, 0, 0),
    "empty-docs": (7, 0, 3, 0),
    "non-utf8-cp1252": (9, 1, 0, 0),
    "very-long-line": (3, 0, 0, 0),
    "zero-byte": (0, 1, 0, 0),
    "empty-member": (0, 0, 0, 0),
    "crlf": (10, 0, 0, 0),
    "bom": (10, 0, 0, 0),
    "two-members": (10, 0, 0, 0),
    "extra-field-midway": (10, 0, 0, 0),
    "no-final-newline": (5, 0, 0, 0),
    "not-gzip-plain-json": (5, 0, 0, 0),
    "odd-unicode": (3, 0, 0, 1),
}


@pytest.mark.realtext
@pytest.mark.parametrize("name", AWKWARD)
def test_real_awkward_shards_have_the_agreed_outcome(shared_dir, name):
    assert outcome(shared_dir / "data" / "awkward" / f"{name}.json.gz") == AWKWARD[name]


def generated(name: str) -> bytes:
    """The same kinds of file as the real awkward shards, made here."""
    lines = lines_of(10)
    plain = {
        "good-control": b"\n".join(lines_of(40)) + b"\n",
        "invalid-json-line": b"\n".join([*lines[:4], lines[4][:200], *lines[5:]]) + b"\n",
        "missing-text": b"\n".join([*lines[:3], b'{"url": "a"}', *lines[4:6], b'{"text": null}', *lines[7:]]),
        "text-not-a-string": b"\n".join([*lines[:3], b'{"text": 12345}', *lines[4:]]) + b"\n",
        "empty-docs": b"\n".join(
            [b'{"text": ""}', *lines[:3], b'{"text": " \\n\\t"}', *lines[3:7], b'{"text": "\xe2\x80\x8b"}']
        )
        + b"\n\n\n",
        "non-utf8-cp1252": b"\n".join([*lines[:4], '{"text": "café – “so”"}'.encode("cp1252"), *lines[5:]]) + b"\n",
        "very-long-line": b"\n".join([lines[0], json.dumps({"text": "long words " * 1_050_000}).encode(), lines[1]]),
        "empty-member": b"",
        "crlf": b"\r\n".join(lines) + b"\r\n",
        "bom": b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n",
        "extra-field-midway": b"\n".join([*lines[:5], *(line[:-1] + b', "lang": "en"}' for line in lines[5:])]),
        "no-final-newline": b"\n".join(lines[:5]),
        "odd-unicode": b"\n".join([lines[0], rb'{"text": "a\u0000b \ud800 \ud83d\ude00 e\u0301 \u2028 x"}', lines[1]]),
    }
    if name in plain:
        return gzip.compress(plain[name], mtime=0)
    if name == "two-members":
        return gzip.compress(b"\n".join(lines[:5]) + b"\n", mtime=0) + gzip.compress(b"\n".join(lines[5:]), mtime=0)
    if name == "not-gzip-plain-json":
        return b"\n".join(lines[:5])
    assert name == "zero-byte"
    return b""


@pytest.mark.parametrize("name", [name for name in AWKWARD if name not in ("truncated", "corrupt-byte")])
def test_generated_awkward_files_have_the_agreed_outcome(tmp_path, name):
    file = tmp_path / f"{name}.json.gz"
    file.write_bytes(generated(name))
    assert outcome(file) == AWKWARD[name]


def test_what_each_bad_line_is_called(tmp_path):
    file = tmp_path / "bad.jsonl"
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut off',
        b'["text"]',
        b"7",
        b"null",
        b'{"txt": "misspelt"}',
        b'{"text": null}',
        b'{"text": true}',
        b'{"text": ["a"]}',
        b'{"text": "caf\xe9"}',
        b"[" * 100_000,
        b'{"text": "tab\tinside"}',
        b'{"text": ' + b"9" * 5000 + b"}",
        b"",
        b'{"text": "also good"}',
    ]
    file.write_bytes(b"\n".join(lines))
    assert texts(file) == ["good", "also good"]
    found = dict(bad(file))
    assert list(found) == list(range(2, 14))
    assert "not valid JSON" in found[2]
    assert "a list, not an object" in found[3]
    assert "a number, not an object" in found[4]
    assert "null, not an object" in found[5]
    assert "`text` is missing" in found[6]
    assert "`text` is null" in found[7]
    assert "a boolean, not a string" in found[8]
    assert "a list, not a string" in found[9]
    assert "not UTF-8 (byte 0xe9 at position 13" in found[10]
    assert "not usable JSON" in found[11]
    assert "not valid JSON" in found[12]
    assert "not usable JSON" in found[13]


def test_surrogates_are_replaced_and_counted_and_pairs_are_kept(tmp_path):
    file = tmp_path / "surrogates.jsonl"
    file.write_bytes(rb'{"text": "a \ud800 b \udfff c \ud83d\ude00"}')
    assert list(ShardReader(file)) == [Document(1, "a \ufffd b \ufffd c \U0001f600", 2)]


@pytest.mark.parametrize(
    "text", ["", " \t\r\n", "\u200b", "\u200b\u200d \ufeff", "\u00ad", "\x00\x00", "\u2060\u3164", "\ufe0f", "\u3000"]
)
def test_nothing_visible_is_empty(tmp_path, text):
    file = tmp_path / "empty.jsonl"
    file.write_text(json.dumps({"text": text}))
    assert list(ShardReader(file)) == [EmptyDocument(1)]


@pytest.mark.parametrize("text", [".", "\u200bx", "\u0301", "\U0001f600", "مرحبا", "。"])
def test_anything_visible_is_kept_as_it_is(tmp_path, text):
    file = tmp_path / "kept.jsonl"
    file.write_text(json.dumps({"text": text}))
    assert list(ShardReader(file)) == [Document(1, text, 0)]


def test_every_cut_of_a_gzip_file_keeps_whole_lines_and_says_so_once(tmp_path):
    lines = lines_of(8)
    whole = gzip.compress(b"\n".join(lines) + b"\n", mtime=0)
    expected = [json.loads(line)["text"] for line in lines]
    file = tmp_path / "cut.json.gz"
    counts = set()
    for length in [*range(3, len(whole), 37), len(whole) - 1]:
        file.write_bytes(whole[:length])
        found = texts(file)
        assert found == expected[: len(found)]
        ((line, reason),) = bad(file)
        assert line == len(found) + 1
        assert "cut short" in reason
        counts.add(len(found))
    assert counts >= {0, 3, 7, 8}


def test_every_flipped_byte_of_a_gzip_file_is_survived_and_reported(tmp_path):
    lines = lines_of(8)
    expected = [json.loads(line)["text"] for line in lines]
    whole = gzip.compress(b"\n".join(lines) + b"\n", mtime=0)
    file = tmp_path / "flipped.json.gz"
    salvaged = 0
    for place in range(10, len(whole), 53):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        records = list(ShardReader(file))
        assert "gzip data" in records[-1].reason
        salvaged += sum(isinstance(record, Document) and record.text in expected for record in records)
    assert salvaged > 50


@pytest.mark.parametrize("piece", [1 << 18, 1000])
def test_damage_costs_the_same_however_the_file_is_read(tmp_path, monkeypatch, piece):
    whole = bytearray(gzip.compress(b"\n".join(lines_of(40)) + b"\n", mtime=0))
    whole[-6] ^= 1  # the checksum: every line came through before it was read
    file = tmp_path / "checksum.json.gz"
    file.write_bytes(bytes(whole))
    monkeypatch.setattr(decompress, "_READ_BYTES", piece)
    assert outcome(file) == (40, 1, 0, 0)
    assert "incorrect data check" in bad(file)[0][1]


def test_padding_after_a_gzip_member_is_nothing_and_garbage_is_bad(tmp_path):
    member = gzip.compress(b"\n".join(lines_of(3)) + b"\n")
    file = tmp_path / "padded.json.gz"
    file.write_bytes(member + bytes(1000))
    assert outcome(file) == (3, 0, 0, 0)
    file.write_bytes(member + bytes(1000) + gzip.compress(b"\n".join(lines_of(2))))
    assert outcome(file) == (5, 0, 0, 0)
    file.write_bytes(member + b"garbage")
    assert outcome(file) == (3, 1, 0, 0)


def test_text_files_are_split_at_blank_lines(tmp_path):
    content = "\ufeffTitle\r\n\r\nFirst paragraph,\r\ntwo lines.\r\n \t\r\n\r\n\u200b\r\n\r\nLast one"
    for name, data in (("book.txt", content.encode()), ("book.TXT.gz", gzip.compress(content.encode()))):
        (tmp_path / name).write_bytes(data)
        assert list(ShardReader(tmp_path / name)) == [
            Document(1, "Title", 0),
            Document(3, "First paragraph,\ntwo lines.", 0),
            EmptyDocument(7),
            Document(9, "Last one", 0),
        ]


def test_text_that_is_not_utf8_costs_its_paragraph_and_names_the_line(tmp_path):
    file = tmp_path / "book.txt"
    file.write_bytes(b"good\n\nline one\ncaf\xe9\n\nalso good\n")
    assert texts(file) == ["good", "also good"]
    assert bad(file) == [(4, "not UTF-8 (byte 0xe9 at position 3 of the text)")]


def test_too_long_documents_are_bad_and_reading_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(decompress, "_READ_BYTES", 30)
    file = tmp_path / "long.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": "' + b"b" * 500 + b'"}\n{"text": "c"}\n' + b"d" * 500)
    assert texts(file) == ["a", "c"]
    assert bad(file) == [(2, "longer than 100 bytes"), (4, "longer than 100 bytes")]
    file = tmp_path / "long.txt"
    file.write_bytes(b"a\n\n" + b"b b b b b\n" * 50 + b"\nc\n")
    assert texts(file) == ["a", "c"]
    assert bad(file) == [(3, "longer than 100 bytes")]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(st.text(max_size=30), max_size=12), st.integers(1, 40), st.sampled_from([b"\n", b"\r\n"]), st.booleans()
)
def test_lines_do_not_depend_on_how_the_file_is_read(tmp_path, documents, piece, newline, compressed):
    documents = [text.encode("utf-8", "replace").decode() for text in documents]
    data = newline.join(json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0).encode() for text in documents)
    file = tmp_path / "any.jsonl"
    file.write_bytes(gzip.compress(data) if compressed else data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decompress, "_READ_BYTES", piece)
        patch.setattr(decompress, "_PIECE_BYTES", piece)
        records = list(ShardReader(file)) if data else []
    assert [record.line for record in records] == list(range(1, len(documents) + 1))
    for record, text in zip(records, documents, strict=True):
        assert isinstance(record, EmptyDocument) or record == Document(record.line, text, 0)


def test_a_file_without_lines_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_DOCUMENT_BYTES", 1000)
    file = tmp_path / "endless.jsonl"
    file.write_bytes(b"x" * 30_000_000)
    tracemalloc.start()
    try:
        assert bad(file) == [(1, "longer than 1000 bytes")]
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_stop_is_noticed_while_reading_and_while_passing_over(tmp_path):
    file = tmp_path / "shard.jsonl.gz"
    file.write_bytes(gzip.compress(b"\n".join(lines_of(50))))
    with pytest.raises(StopRequested):
        list(ShardReader(file, should_stop=lambda: True))
    with pytest.raises(StopRequested):
        list(ShardReader(file, Position(50, 10**9), should_stop=lambda: True))


def test_a_file_that_cannot_be_opened_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"gone\.jsonl cannot be read: No such file"):
        list(ShardReader(tmp_path / "gone.jsonl"))


def test_text_is_utf8_whatever_the_locale(tmp_path):
    """R25: under LC_ALL=C, with a file name that is not ASCII either."""
    file = tmp_path / "dätä.jsonl"
    file.write_text('{"text": "naïve – 日本"}\n', encoding="utf-8")
    program = (
        "import sys; from pathlib import Path; from blockllm_cli.data.reader import ShardReader\n"
        "(record,) = ShardReader(Path(sys.argv[1])); print(ascii(record.text))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", program, str(file)], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ascii("naïve – 日本").encode()
