"""The folder for what is made or fetched once and used by every run."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """`$BLOCKLLM_CACHE`, else `blockllm` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    if own := os.environ.get("BLOCKLLM_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "blockllm"
