"""Corpora of a hub, C4 and any other text dataset: what is asked of it, and what is done when it is out of reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from blockllm_cli.data.stopping import StopCheck
from blockllm_cli.errors import InputError
from blockllm_cli.hub.link import OFFLINE_WAYS, Link
from blockllm_cli.hub.listing import Listing, Wanted, fetch_listing, kept_listing
from blockllm_cli.hub.remote import RemoteFile
from blockllm_cli.hub.shards import HubShard, ShardCache

if TYPE_CHECKING:
    from blockllm_cli.recipe.sections import Data

C4_REPOSITORY, C4_CONFIGURATION = "allenai/c4", "en"
"""Where C4 is: its names on the hub have changed before, and are written down here only."""

READABLE = (".json", ".jsonl", ".ndjson", ".parquet", ".txt", ".text", ".md", ".arrow")
"""Endings of files that hold documents, before any .gz or .zst."""


def hub_shards(
    data: Data, cache: Path, link: Link, say: Callable[[str], None], should_stop: StopCheck
) -> tuple[tuple[HubShard, ...], tuple[HubShard, ...]]:
    """The shards of the training and of the validation split; the second is empty where the dataset has none.

    Args:
        data: the resolved table, with corpus "c4" or "hub".
        cache: folder for lists of files and for what is fetched.
        link: to the hub; where that is out of reach, it is told so and asks nothing.
        say: told what is done without the hub.
        should_stop: looked at while the hub is asked.

    Raises:
        InputError: the dataset, a split or a pattern is not there, or the hub is out of reach and was not asked before.
        StopRequested: `should_stop` became true.
    """
    wanted = wanted_of(data)
    lists = cache / "listings"
    if link.probe(should_stop) is None:
        listing = fetch_listing(wanted, lists, link, should_stop)
    else:
        kept = kept_listing(wanted, lists)
        if kept is None:
            raise InputError(
                f'data.corpus = "{data.corpus}" needs {wanted}, and {link.out_of_reach}. What works {OFFLINE_WAYS}'
            )
        say(f"note: {link.out_of_reach}: going on with what was fetched of {wanted} before")
        listing = kept
    shards = ShardCache(cache / "shards", data.shard_cache_bytes)
    train = _chosen("data.train", data.train or ("train",), listing, wanted)
    if data.validation is None and "validation" not in listing.splits:
        validation: tuple[RemoteFile, ...] = ()
    else:
        validation = _chosen("data.validation", data.validation or ("validation",), listing, wanted)
    return (
        tuple(HubShard(file, shards, link) for file in train),
        tuple(HubShard(file, shards, link) for file in validation),
    )


def wanted_of(data: Data) -> Wanted:
    """The dataset that the table names."""
    if data.corpus == "c4":
        return Wanted(C4_REPOSITORY, C4_CONFIGURATION, data.revision)
    assert data.repository is not None  # the schema asks for it
    return Wanted(data.repository, data.configuration, data.revision)


def _chosen(key: str, names: Sequence[str], listing: Listing, wanted: Wanted) -> tuple[RemoteFile, ...]:
    """Files of the splits that are named, and files whose path fits a pattern, each once."""
    everything = {file.path: file for files in listing.splits.values() for file in files}
    found: dict[str, RemoteFile] = {}
    for name in names:
        if name in listing.splits:
            files = list(listing.splits[name])
        else:
            files = [file for path, file in everything.items() if fnmatchcase(path, name)]
        if not files:
            raise InputError(
                f"{key}: {wanted} has no split {name!r} and no file that this fits as a pattern; its splits are "
                f"{', '.join(listing.splits) or 'none'}"
            )
        found.update((file.path, file) for file in files)
    unreadable = [path for path in found if not _is_readable(path)]
    if unreadable:
        raise InputError(
            f"{key}: {unreadable[0]} of {wanted} is not of a kind that is read here ({', '.join(READABLE)}): name "
            "other files"
        )
    return tuple(found.values())


def _is_readable(path: str) -> bool:
    lowered = path.lower()
    return lowered.removesuffix(".gz").removesuffix(".zst").endswith(READABLE)
