"""The files of a run and which of their documents train and which validate."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from blockllm_cli.data.cache import default_cache_dir
from blockllm_cli.data.hub_corpus import hub_shards
from blockllm_cli.data.reader import ShardReader
from blockllm_cli.data.records import Document
from blockllm_cli.data.shards import Shard, shard_identity
from blockllm_cli.data.stopping import Progress, StopCheck, never, unheard
from blockllm_cli.errors import InputError, RecipeError
from blockllm_cli.hub.link import Link

if TYPE_CHECKING:
    from blockllm_cli.recipe.sections import Data

HELD_OUT_OF = 20
"""Without validation files, one document in this many is held out of the training files."""

Part = Literal["all", "train", "validation"]


@dataclass(frozen=True)
class Corpus:
    """Some files, and the part of their documents that belongs to this side.

    Attributes:
        shards: the files, in an order that depends on their names only.
        part: "all" documents, or the side of the split by `is_held_out`.
    """

    shards: tuple[Shard, ...]
    part: Part = "all"

    @property
    def names(self) -> list[str]:
        """A short name per shard for labels: the file's name, or its path where two files share a name."""
        seen = Counter(shard.name for shard in self.shards)
        return [shard.name if seen[shard.name] == 1 else str(shard) for shard in self.shards]

    def holds(self, text: str) -> bool:
        """Whether a document of the files belongs to this side."""
        return self.part == "all" or is_held_out(text) == (self.part == "validation")

    def texts(self, should_stop: StopCheck = never) -> Iterator[str]:
        """Text of each good document of this side, in file order; bad ones are passed over.

        Raises:
            InputError: a file cannot be opened or its format is not supported here.
            StopRequested: `should_stop` became true.
        """
        for shard in self.shards:
            for record in ShardReader(shard, should_stop=should_stop):
                if isinstance(record, Document) and self.holds(record.text):
                    yield record.text

    def fingerprint(self) -> str:
        """Identity of the content: part, and `shard_identity` of each shard; the same wherever the files lie.

        Raises:
            InputError: a file is gone.
        """
        identity = hashlib.sha256(self.part.encode())
        for shard in self.shards:
            identity.update(bytes.fromhex(shard_identity(shard)))
        return identity.hexdigest()


@dataclass(frozen=True)
class Corpora:
    """The two sides of a run's data."""

    train: Corpus
    validation: Corpus


def is_held_out(text: str) -> bool:
    """Whether a document is held out for validation where no validation files are given.

    Depends on the text alone, so that copies of a document fall on one side, wherever they are.
    """
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_OF == 0


def open_corpora(
    data: Data,
    *,
    cache: Path | None = None,
    link: Link | None = None,
    say: Callable[[str], None] = lambda _: None,
    should_stop: StopCheck = never,
    progress: Progress = unheard,
) -> Corpora:
    """Find the files that `[data]` names; nothing is read of them, except that the builtin corpus is gathered once.

    Args:
        data: the resolved table; relative patterns are relative to the current directory.
        cache: folder for what is made or fetched once; None: `default_cache_dir()`.
        link: to the hub, for corpora that are there; None: one that nobody watches.
        say: told of what a user should know.
        should_stop: asked while the builtin corpus is gathered or a hub is waited for.
        progress: told how many source files of how many have been read for the builtin corpus.

    Raises:
        InputError: a pattern names no file, or the hub does not give the list of its files.
        RecipeError: the table names files that its corpus does not read.
        StopRequested: `should_stop` became true.
    """
    if data.corpus == "builtin":
        from blockllm_cli.data.builtin import builtin_corpus

        for key, files in (("data.train", data.train), ("data.validation", data.validation)):
            if files:
                raise RecipeError(
                    f'{key} names files, which data.corpus = "builtin" does not read: set data.corpus = "files", or '
                    f"leave {key} out"
                )
        return _sides((builtin_corpus(cache, should_stop=should_stop, progress=progress).path,), ())
    if data.corpus == "files":
        if not data.train:
            raise RecipeError('data.corpus = "files" needs data.train, such as data.train = "folder/*.json.gz"')
        validation = found_files("data.validation", data.validation) if data.validation else ()
        return _sides(found_files("data.train", data.train), validation)
    folder = (cache or default_cache_dir()) / "hub"
    return _sides(*hub_shards(data, folder, link or Link(data.retry_seconds), say, should_stop))


def _sides(train: Sequence[Shard], validation: Sequence[Shard]) -> Corpora:
    """Without shards of its own, validation is the part of the training shards that is held out."""
    if validation:
        return Corpora(Corpus(tuple(train)), Corpus(tuple(validation)))
    return Corpora(Corpus(tuple(train), "train"), Corpus(tuple(train), "validation"))


def found_files(key: str, patterns: str | Sequence[str]) -> tuple[Path, ...]:
    """Files that match one or several globs (`**` crosses folders), each once, sorted by path.

    Raises:
        InputError: a pattern matches no file; the message names `key` and the pattern.
    """
    found: dict[str, Path] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        place = os.path.expanduser(pattern)  # noqa: PTH111 (Path fails on `~nobody`, and drops the slash of `folders/*/`)
        # A path that exists is meant as it is, also with a bracket in its name.
        matches = [place] if os.path.lexists(place) else glob.glob(place, recursive=True)  # noqa: PTH207 (Path.glob takes none that begins with /, and finds hidden files, as a shell does not)
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            hint = f"; it is a folder: write {place.rstrip('/')}/*" if Path(place).is_dir() else ""
            raise InputError(f"{key}: {pattern!r} matches no file in {Path.cwd()}{hint}")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return tuple(sorted(found.values(), key=str))
