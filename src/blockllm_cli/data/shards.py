"""A shard is a file: one that is here, or one of a hub that is fetched while it is read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from blockllm_cli.data.stopping import StopCheck
from blockllm_cli.errors import InputError
from blockllm_cli.hub.shards import HubShard

Shard = Path | HubShard

SAMPLED_BYTES = 64 * 1024
"""Read from both ends of a local file for its identity."""


def opened(shard: Shard, should_stop: StopCheck) -> BinaryIO:
    """The content of a shard.

    Args:
        shard: which.
        should_stop: looked at while a read waits for a hub; the read then raises `StopRequested`.

    Raises:
        InputError: it cannot be opened; by a read: the hub does not give it.
    """
    if isinstance(shard, HubShard):
        return shard.opened(should_stop)
    try:
        return shard.open("rb")
    except OSError as error:
        raise unreadable(shard, error) from error


def local_path(shard: Shard, should_stop: StopCheck) -> Path:
    """The whole shard as a file that is here, for libraries that want a path.

    Raises:
        InputError: the hub does not give it.
        StopRequested: `should_stop` became true.
    """
    return shard.local(should_stop) if isinstance(shard, HubShard) else shard


def shard_identity(shard: Shard) -> str:
    """Hex identity of name and content, the same wherever the file lies; nothing is asked of a hub.

    A local file is identified by its size and both its ends; one of a hub by the hash that the hub lists.

    Raises:
        InputError: a local file is gone.
    """
    if isinstance(shard, HubShard):
        content = f"{shard.remote.size}\0{shard.remote.content}".encode()
    else:
        try:
            size = shard.stat().st_size
            with shard.open("rb") as file:
                ends = file.read(SAMPLED_BYTES)
                file.seek(max(0, size - SAMPLED_BYTES))
                ends += file.read(SAMPLED_BYTES)
        except OSError as error:
            raise unreadable(shard, error) from error
        content = str(size).encode() + b"\0" + hashlib.sha256(ends).hexdigest().encode()
    return hashlib.sha256(os.fsencode(shard.name) + b"\0" + content).hexdigest()


def unreadable(shard: Shard, error: OSError) -> InputError:
    """What is said of a shard that the system does not let us read."""
    return InputError(f"{shard} cannot be read: {error.strerror or error}")
