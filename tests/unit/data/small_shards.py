"""What tests of the reader ask of a shard, and lines to fill one with."""

import json
import random
from pathlib import Path

from blockllm_cli.data.reader import ShardReader
from blockllm_cli.data.records import BadDocument, Document, EmptyDocument


def outcome(path: Path) -> tuple[int, int, int, int]:
    records = list(ShardReader(path))
    good = [record for record in records if isinstance(record, Document)]
    return (
        len(good),
        sum(isinstance(record, BadDocument) for record in records),
        sum(isinstance(record, EmptyDocument) for record in records),
        sum(record.surrogates for record in good),
    )


def texts(path: Path) -> list[str]:
    return [record.text for record in ShardReader(path) if isinstance(record, Document)]


def bad(path: Path) -> list[tuple[int, str]]:
    return [(record.line, record.reason) for record in ShardReader(path) if isinstance(record, BadDocument)]


def lines_of(count: int, begin: int = 0) -> list[bytes]:
    # Each line is different and does not compress to nothing, so that damage hits some and spares others.
    return [
        json.dumps({"text": f"document {i} " + "".join(random.Random(i).choices("abcdefghij klmnop", k=400))}).encode()
        for i in range(begin, begin + count)
    ]
