"""A file of a hub repository, named by what is in it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["dataset", "model"]

_GIT_BLOB_LENGTH, _SHA256_LENGTH = 40, 64


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository at one commit.

    Attributes:
        repository: `owner/name`.
        kind: of the repository.
        commit: full hash.
        path: inside the repository.
        size: bytes.
        content: hex SHA-256 of the content (large files), or its git blob hash: equal means equal bytes.
    """

    repository: str
    kind: Kind
    commit: str
    path: str
    size: int
    content: str

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]

    @property
    def url(self) -> str:
        """Where the bytes are, at the hub that is asked now."""
        from huggingface_hub import hf_hub_url

        from blockllm_cli.hub.http import endpoint

        address: str = hf_hub_url(
            self.repository, self.path, repo_type=self.kind, revision=self.commit, endpoint=endpoint()
        )
        return address

    def is_in(self, file: Path) -> bool:
        """Whether `file` has the content that the hub lists; reads all of it."""
        if len(self.content) == _SHA256_LENGTH:
            digest = hashlib.sha256()
        elif len(self.content) == _GIT_BLOB_LENGTH:
            digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        else:
            return file.stat().st_size == self.size
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest() == self.content

    def as_json(self) -> dict[str, Any]:
        """Plain values; the constructor takes them."""
        return asdict(self)
