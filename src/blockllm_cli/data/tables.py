"""Documents of files that are tables: parquet through `pyarrow`, arrow through `datasets`.

A row counts as a line; the document is in the column `text`. What these libraries cannot read of a file is lost to its
end, which is one bad document: they do not say where the next good row begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from blockllm_cli.data.records import BadDocument, Record, not_utf8, told_apart
from blockllm_cli.data.shards import Shard, local_path
from blockllm_cli.data.stopping import StopCheck
from blockllm_cli.errors import InputError, StopRequested

PARQUET_MAGIC = b"PAR1"
ARROW_NAME = ".arrow"


def parquet_rows(shard: Shard, start: int, should_stop: StopCheck) -> Iterator[tuple[int, Record]]:
    """Number (from 1) and record of each row of a parquet file after the first `start`.

    Raises:
        InputError: `pyarrow` is not installed, or a hub does not give the file.
        StopRequested: `should_stop` became true.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            f"{shard} is a parquet file, which needs a package that is not installed: pip install pyarrow"
        ) from error
    path = local_path(shard, should_stop)
    number = start
    try:
        with parquet.ParquetFile(path) as file:
            for number, record in _rows_of_groups(file, start, pyarrow, should_stop):
                yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        yield number, BadDocument(number + 1, f"damaged parquet data ({error}); the rest of the file is lost")


def _rows_of_groups(file: Any, start: int, pyarrow: Any, should_stop: StopCheck) -> Iterator[tuple[int, Record]]:
    schema = file.schema_arrow
    if "text" not in schema.names:
        yield start, _without_text(schema.names)
        return
    kind = schema.field("text").type
    types = pyarrow.types
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        yield start, BadDocument(0, f"the column `text` is of type {kind}, not string; the file is left out")
        return
    number = unread = start
    groups = list(range(file.num_row_groups))
    while groups and unread >= file.metadata.row_group(groups[0]).num_rows:
        unread -= file.metadata.row_group(groups.pop(0)).num_rows
    for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=["text"]):
        if should_stop():
            raise StopRequested
        column = batch.column(0)
        for i in range(min(unread, len(column)), len(column)):
            number += 1
            try:
                text = column[i].as_py()
            except UnicodeDecodeError as error:
                yield number, BadDocument(number, not_utf8(error))
                continue
            yield number, _cell(text, number)
        unread -= min(unread, len(column))


def arrow_rows(shard: Shard, start: int, should_stop: StopCheck) -> Iterator[tuple[int, Record]]:
    """Number (from 1) and record of each row of an arrow file after the first `start`.

    Raises:
        InputError: `datasets` is not installed, or a hub does not give the file.
        StopRequested: `should_stop` became true.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{shard} needs a package that is not installed: pip install datasets") from error
    path = local_path(shard, should_stop)
    number = start
    try:
        rows = datasets.load_dataset("arrow", data_files=str(path), split="train", streaming=True)
        for row in rows.skip(start):
            if should_stop():
                raise StopRequested
            if "text" not in row:
                yield start, _without_text(row)
                return
            number += 1
            yield number, _cell(row["text"], number)
    except StopRequested:
        raise
    except Exception as error:  # pyarrow and the library itself each have errors of their own
        reason = str(error).partition("\n")[0] or type(error).__name__
        yield number, BadDocument(number + 1, f"damaged arrow data ({reason}); the rest of the file is lost")


def _without_text(columns: Any) -> BadDocument:
    return BadDocument(0, f"no column `text` (columns: {', '.join(columns)}); the file is left out")


def _cell(value: Any, number: int) -> Record:
    if value is None:
        return BadDocument(number, "`text` is null")
    return told_apart(value, number) if isinstance(value, str) else BadDocument(number, "`text` is not a string")
