"""The bytes of a file, decompressed if its first bytes say that it is compressed, and salvaged if it is damaged."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from blockllm_cli.data.shards import Shard, opened, unreadable
from blockllm_cli.data.stopping import StopCheck, never
from blockllm_cli.errors import InputError

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

_READ_BYTES = 1 << 18
_ZSTD_READ_BYTES = 1 << 14  # what one call has put out is lost when the call meets damage, and it cannot be repeated
_PIECE_BYTES = 1 << 22  # a bomb is inflated in pieces of this size
_GZIP_WBITS = 31


class DamagedError(Exception):
    """The compressed data cannot be read any further; all bytes before the damage have been yielded."""


def decompressed(shard: Shard, skip: int = 0, should_stop: StopCheck = never) -> Iterator[bytes]:
    """Yield the content of `shard` in pieces of at most a few MiB, without its first `skip` bytes.

    Gzip and zstandard are told by their first bytes, whatever the name; several members or frames one after the other
    are read as one. A plain file is not read up to `skip`, a compressed one is decompressed and thrown away.

    Args:
        shard: what is read.
        skip: bytes of the decompressed content to leave out.
        should_stop: looked at while a hub is waited for.

    Raises:
        DamagedError: the data break off or fail a check.
        InputError: `shard` cannot be read, or is zstandard and the package is not installed.
        StopRequested: `should_stop` became true.
    """
    try:
        with opened(shard, should_stop) as file:
            magic = file.read(4)
            file.seek(0)
            if magic.startswith(GZIP_MAGIC):
                yield from _without(_gunzipped(file), skip)
            elif magic == ZSTD_MAGIC:
                yield from _without(_unzstd(file, shard), skip)
            else:
                file.seek(skip)
                while piece := file.read(_READ_BYTES):
                    yield piece
    except OSError as error:
        raise unreadable(shard, error) from error


def _without(pieces: Iterator[bytes], skip: int) -> Iterator[bytes]:
    for piece in pieces:
        if skip >= len(piece):
            skip -= len(piece)
            yield b""  # so that whoever reads can stop in between
        else:
            yield piece[skip:]
            skip = 0


def _gunzipped(file: BinaryIO) -> Iterator[bytes]:
    member = zlib.decompressobj(wbits=_GZIP_WBITS)
    is_begun = False
    data = file.read(_READ_BYTES)
    while data:
        is_begun = True
        before = member.copy()
        try:
            piece = member.decompress(data, _PIECE_BYTES)
        except zlib.error as error:
            yield _salvaged(before, data)
            raise DamagedError(f"damaged gzip data ({error}); the rest of the file is lost") from error
        if piece:
            yield piece
        if not member.eof:
            data = member.unconsumed_tail or file.read(_READ_BYTES)
            continue
        data = member.unused_data or file.read(_READ_BYTES)
        while data and not (data := data.lstrip(b"\0")):  # padding after a member, as tapes and block copies leave it
            data = file.read(_READ_BYTES)
        member = zlib.decompressobj(wbits=_GZIP_WBITS)
        is_begun = False
    if is_begun:
        raise DamagedError("the gzip data break off: the file is cut short")


def _salvaged(member: Any, data: bytes) -> bytes:
    """What `member` (a zlib decompressor) puts out of `data` before the byte at which it fails."""
    pieces = []
    try:
        for i in range(len(data)):
            pieces.append(member.decompress(data[i : i + 1]))
    except zlib.error:
        pass
    return b"".join(pieces)


def _unzstd(file: BinaryIO, shard: Shard) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise InputError(
            f"{shard} is compressed with zstandard, which needs a package that is not installed: pip install zstandard"
        ) from error
    # 2 GiB is the largest window of the format; shards made with `zstd --long` use it.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = decompressor.decompressobj()
    is_begun = False
    data = file.read(_ZSTD_READ_BYTES)
    while data:
        is_begun = True
        try:
            piece = frame.decompress(data)
        except zstandard.ZstdError as error:
            raise DamagedError(f"damaged zstandard data ({error}); the rest of the file is lost") from error
        if piece:
            yield piece
        data = b""
        if frame.eof:
            data = frame.unused_data
            frame = decompressor.decompressobj()
            is_begun = False
        data = data or file.read(_ZSTD_READ_BYTES)
    if is_begun:
        raise DamagedError("the zstandard data break off: the file is cut short")
