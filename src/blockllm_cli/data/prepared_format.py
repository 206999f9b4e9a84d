"""How the token ids of one shard lie on disk: an entry of the tokenised cache.

An entry is a folder `tokens/<key of the tokenizer>/<identity of the shard>` of the cache with

- `ids.bin`: the ids of all good documents one after the other, little-endian uint16 where the vocabulary allows, else
  int32, without BOS and EOS: rows of any layout and length can be made of them;
- `records.bin`: what the reader said of the shard, in its order, one record of `RECORD` for each good, empty or bad
  document, so that counts, events and positions are those of the text;
- `manifest.json`: sizes and hashes of the two, why bad documents are bad, totals, and which file it was made of.

What it says is believed as far as it can be checked where it is used: the records by their hash, the ids of a document
by the checksum in its record, and the entry as a whole by the name of its folder, which is that of its shard.

It is written beside, synced and renamed. Nothing in it depends on seed, epoch, layout, length, block size, or ranks.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from blockllm_cli.data.shards import Shard
from blockllm_cli.durable import file_sha256

FORMAT = 2
"""Part of every key: raise it with a change of these files, of what the reader makes of a shard, or of the split."""

IDS, RECORDS, MANIFEST = "ids.bin", "records.bin", "manifest.json"

GOOD, HELD_OUT, EMPTY, BAD = range(4)
"""Kinds of records; documents that `corpus.is_held_out` holds out are good as well."""

RECORD = np.dtype(
    [
        ("line", "<i8"),  # where the document begins, from 1; 0: the file as a whole
        ("line_after", "<i8"),  # position of the reader after it
        ("offset_after", "<i8"),
        ("end", "<i8"),  # ids of this and all documents before it
        ("bytes", "<i4"),  # of its text in UTF-8
        ("surrogates", "<i4"),  # replaced in it
        ("checksum", "<u4"),  # `checksum` of its ids
        ("kind", "<u1"),
    ]
)

_IDS_TYPES = ("<u2", "<i4")
_SMALL_VOCABULARY = 1 << 16
_KEY_CHARACTERS = 32


class Vocabulary(Protocol):
    """What of a tokenizer decides ids and their size."""

    @property
    def vocab_size(self) -> int:
        """Number of pieces; ids are below it."""

    @property
    def model_bytes(self) -> bytes:
        """All that the constructor of the class needs."""


@dataclass(frozen=True)
class Source:
    """The local file that an entry was made of.

    Attributes:
        modified_ns: time of its last change.
        sha256: of all of it, compressed as it is.
    """

    modified_ns: int
    sha256: str


@dataclass(frozen=True)
class Totals:
    """What an entry holds.

    Attributes:
        documents: good documents, those held out among them.
        held_out: good documents that validate where no validation files are given.
        empty: documents without a visible character.
        bad: documents that cannot be used.
        tokens: ids.
        bytes: UTF-8 bytes of the good documents.
        surrogates: lone surrogates replaced.
    """

    documents: int = 0
    held_out: int = 0
    empty: int = 0
    bad: int = 0
    tokens: int = 0
    bytes: int = 0
    surrogates: int = 0


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        format: `FORMAT` of the program that wrote it.
        shard: name of the file.
        identity: `shards.shard_identity` of it.
        ids: numpy name of the type of `ids.bin`.
        totals: what the entry holds.
        sizes: bytes of each file of the entry.
        sha256: hash of each file of the entry.
        reasons: why each bad document is bad, in order.
        source: the file; None for one of a hub, whose identity says all.
    """

    format: int
    shard: str
    identity: str
    ids: str
    totals: Totals
    sizes: Mapping[str, int]
    sha256: Mapping[str, str]
    reasons: tuple[str, ...]
    source: Source | None

    def as_json(self) -> dict[str, Any]:
        """Plain values; `parsed` takes them."""
        return asdict(self)

    @staticmethod
    def parsed(content: bytes) -> Manifest:
        """The manifest in `content`.

        Raises:
            ValueError: it is not one, or not one of this version.
        """
        try:
            plain = json.loads(content)
            source = plain.pop("source")
            plain["totals"] = Totals(**plain["totals"])
            plain["reasons"] = tuple(plain["reasons"])
            manifest = Manifest(**plain, source=Source(**source) if source else None)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{MANIFEST} is damaged") from error
        if manifest.format != FORMAT:
            raise ValueError(f"it has format {manifest.format}, and this version reads {FORMAT}")
        if not manifest.is_sound():
            raise ValueError(f"{MANIFEST} is damaged")
        return manifest

    def is_sound(self) -> bool:
        """Whether types and sizes fit each other; what is read with another type of ids would be other ids."""
        if not isinstance(self.sizes, dict) or not isinstance(self.sha256, dict) or self.ids not in _IDS_TYPES:
            return False
        if not {IDS, RECORDS} <= self.sizes.keys() & self.sha256.keys():
            return False
        ids_bytes = self.totals.tokens * np.dtype(self.ids).itemsize
        return bool(self.sizes[IDS] == ids_bytes) and isinstance(self.sizes[RECORDS], int)


@dataclass(frozen=True)
class Entry:
    """An entry that is there, as far as sizes tell.

    Attributes:
        folder: where it is.
        manifest: what it says of itself.
    """

    folder: Path
    manifest: Manifest

    def check(self) -> None:
        """Read all of it and compare hashes.

        Raises:
            ValueError: a file is not what was written.
        """
        for name, expected in self.manifest.sha256.items():
            if file_sha256(self.folder / name) != expected:
                raise ValueError(f"{name} is damaged: its hash is not that of the manifest")


def open_entry(folder: Path) -> Entry | None:
    """The entry in `folder`; None where there is none.

    Raises:
        ValueError: what is there is damaged or of another version; the message says how.
        OSError: it cannot be read.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    manifest = Manifest.parsed(content)
    if entry_name(str(manifest.identity)) != folder.name:
        raise ValueError("it was made of another file")
    for name in (IDS, RECORDS):
        found, expected = (folder / name).stat().st_size, manifest.sizes[name]
        if found != expected:
            raise ValueError(f"{name} has {found:,} bytes instead of {expected:,}")
    return Entry(folder, manifest)


def is_source(shard: Shard, manifest: Manifest) -> bool:
    """Whether `shard`, whose identity fits, has the content that the entry was made of.

    The identity of a local file looks at both ends of it only. So where it was touched since, all of it is read once
    more; a copy of the file, whose time is another, passes.

    Raises:
        OSError: it cannot be read.
    """
    if manifest.source is None or not isinstance(shard, Path):
        return True
    return shard.stat().st_mtime_ns == manifest.source.modified_ns or file_sha256(shard) == manifest.source.sha256


def tokens_folder(cache: Path, encoder: Vocabulary) -> Path:
    """Where the entries of a tokenizer are.

    The key is over the bytes of the model: a hash over pieces and scores does not tell how text is normalised.
    """
    kind = f"{FORMAT}\0{type(encoder).__module__}.{type(encoder).__qualname__}\0".encode()
    return cache / "tokens" / hashlib.sha256(kind + encoder.model_bytes).hexdigest()[:_KEY_CHARACTERS]


def checksum(ids: npt.NDArray[Any]) -> int:
    """Of the ids of one document, 1-D, as they lie on disk."""
    return zlib.crc32(np.ascontiguousarray(ids).data)


def entry_name(identity: str) -> str:
    """Name of the folder of an entry."""
    return identity[:_KEY_CHARACTERS]


def ids_type(vocab_size: int) -> np.dtype[Any]:
    """Type of ids on disk."""
    return np.dtype("<u2" if vocab_size <= _SMALL_VOCABULARY else "<i4")
