"""Reads the `.wandb` file of an offline run back: records in the log format of LevelDB, each a protocol buffer."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def payloads(path: Path) -> Iterator[bytes]:
    """The records of a file; each begins with its checksum, its length and which part of a record it is."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    assert struct.unpack("<H", data[4:6]) == (0xBEE1,)
    position, parts = 7, []
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left  # no header fits: the block is filled with zeros
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        part = data[position + 7 : position + 7 + length]
        assert zlib.crc32(part, zlib.crc32(bytes([kind]))) == checksum
        position += 7 + length
        parts.append(part)
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []


@dataclass
class OfflineRun:
    """What a `.wandb` file says.

    Attributes:
        path: the file.
        run: its run record.
        rows: history, without W&B's own keys.
        steps: W&B's step of each row.
        summary: the last value of each key that was set.
        metrics: name (or glob) -> its definition.
        alerts: their titles and texts.
        exit_code: what the run was finished with, or None.
    """

    path: Path
    run: Any = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    alerts: list[tuple[str, str]] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """As it was given."""
        return {item.key: json.loads(item.value_json) for item in self.run.config.update if item.key != "_wandb"}


def read_offline_run(path: Path) -> OfflineRun:
    """Read one file."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = OfflineRun(path)
    for payload in payloads(path):
        record = Record()
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run" and found.run is None:
            found.run = record.run
        elif kind == "history":
            row = _items(record.history.item)
            found.steps.append(row["_step"])
            found.rows.append({key: value for key, value in row.items() if not key.startswith("_")})
        elif kind == "summary":
            found.summary.update(_items(record.summary.update))
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "alert":
            found.alerts.append((record.alert.title, record.alert.text))
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def offline_runs(folder: Path) -> list[OfflineRun]:
    """All offline runs below a run folder, oldest first."""
    return [read_offline_run(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def _items(items) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
