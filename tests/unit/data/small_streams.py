"""Small streams that tests of several files read: one-line settings, generated shards, whole walks as plain values."""

from __future__ import annotations

import json
from pathlib import Path

from word_tokenizer import WordTokenizer

from blockllm_cli.data.corpus import Corpus
from blockllm_cli.data.prepared import NOTHING_PREPARED
from blockllm_cli.data.stream import RowStream, StreamSettings


def settings(**keys) -> StreamSettings:
    return StreamSettings(
        **{"seed": 5, "sequence_length": 6, "layout": "pack", "block_documents": 7, "workers": 0, **keys}
    )


def good(number: int) -> str:
    return json.dumps({"text": " ".join([f"number{number}", *(f"word{number * k % 31}" for k in range(number % 13))])})


def write_shards(folder: Path, lines: list[str], count: int) -> Corpus:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(count):
        paths.append(folder / f"s{i}.jsonl")
        paths[-1].write_text("\n".join(lines[i::count]), encoding="utf-8")
    return Corpus(tuple(paths))


def taken(stream: RowStream, counts) -> list[tuple]:
    """Per take: pieces, documents, labels, events, state afterwards; all as plain values that compare."""
    found = []
    for count in counts:
        part = stream.take(count)
        assert part is not None
        assert len(part.rows) == count
        rows = part.rows
        found.append((rows.pieces.tolist(), rows.documents.tolist(), rows.labels, part.events, stream.state()))
    return found


def walk(corpus: Corpus, counts, *, tokenizer=None, state=None, prepared=NOTHING_PREPARED, **keys) -> list[tuple]:
    encoder = tokenizer or WordTokenizer()
    with RowStream(corpus, encoder, settings=settings(**keys), state=state, prepared=prepared) as stream:
        return taken(stream, counts)


def labels_of(rows: list[tuple]) -> list[str]:
    return [label for row in rows for labels in row[2] for label in labels]
