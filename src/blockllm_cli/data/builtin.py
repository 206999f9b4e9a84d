"""A corpus for a machine without network or data: the prose in the documentation of Python and of our dependencies.

Docstrings are read with `ast` from the source files that are installed; nothing is imported, downloaded, or copied into
the package. The text is technical and repeats itself, and other package versions give another text: perplexities on it
compare only with each other, and only where the hash is the same. Versions and hash are kept beside the cached file.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockllm_cli.data.cache import default_cache_dir
from blockllm_cli.data.stopping import Progress, StopCheck, never, unheard
from blockllm_cli.durable import write_bytes, write_json
from blockllm_cli.errors import InputError, StopRequested, StorageError

# Part of the cache key: raise it with every change that gives another text.
HARVEST_VERSION = 1
# Our dependencies and theirs, those with documentation worth reading. Missing ones are passed over.
PACKAGES = (
    "torch",
    "numpy",
    "pydantic",
    "huggingface_hub",
    "datasets",
    "wandb",
    "rich",
    "typer",
    "tomlkit",
    "psutil",
    "safetensors",
    "pandas",
    "sympy",
    "networkx",
    "jinja2",
    "fsspec",
)
# Folders, at any depth, whose docstrings are not documentation or belong to someone else.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
    | {"_vendor", "vendor", "_vendored", "_inductor", "__pycache__"}
)
MIN_PARAGRAPH_CHARACTERS = 80
MIN_PLAIN_WORDS = 0.75

_PLAIN_WORD = re.compile(r"""["'(]*[A-Za-z][a-z]*(?:['-][A-Za-z]?[a-z]+)*["')]*[.,;:!?]?["')]*""")
_HEADING = re.compile(r"\s*[A-Z][A-Za-z ]*:{1,2}\s*")
_ENTRY = re.compile(r"\s*[*\w`]+(?: \([^)]*\))?:\s")
_CODE = re.compile(r">>>|\.\.\. |::|:\w+:|@\w+|\w+\(\w*=|[={}<>|\\]|^\s*(?:[-*+#$:]|\d+[.)]|\.\. )")


@dataclass(frozen=True)
class BuiltinCorpus:
    """The harvested text as a file of our own cache.

    Attributes:
        path: gzipped JSON lines with `text` and `source` (its package and file).
        sha256: of its lines as they are before compression, which another zlib may do otherwise.
        versions: of Python and of each package the text is from.
        documents: lines of the file, one per module.
        bytes: UTF-8 bytes of the text.
    """

    path: Path
    sha256: str
    versions: dict[str, str]
    documents: int
    bytes: int


def builtin_corpus(
    cache_dir: Path | None = None,
    *,
    progress: Progress = unheard,
    should_stop: StopCheck = never,
) -> BuiltinCorpus:
    """The builtin corpus, from the cache if it was harvested before from these package versions.

    Processes that harvest at the same time write the same bytes; the last one's file stays. A file that is not what
    was written is made again.

    Args:
        cache_dir: folder to keep it under; None: `default_cache_dir()`.
        progress: told (files read, files in all) while harvesting, which takes some 20 seconds of one core.
        should_stop: looked at before every source file.

    Raises:
        StopRequested: `should_stop` became true; nothing is left behind.
        StorageError: the cache cannot be written.
        InputError: no source file is installed with its documentation.
    """
    sources = installed_sources()
    versions = {source.name: source.version for source in sources}
    identity = json.dumps([HARVEST_VERSION, versions], sort_keys=True).encode()
    folder = (cache_dir or default_cache_dir()) / "builtin"
    path = folder / f"{hashlib.sha256(identity).hexdigest()[:16]}.jsonl.gz"
    if (kept := _from_cache(path, versions)) is not None:
        return kept
    documents = harvest(sources, progress, should_stop)
    if not documents:
        raise InputError(
            "the builtin corpus is empty: Python and its packages are installed here without their source files; "
            'set data.corpus = "files" and data.train = "<glob of local files>"'
        )
    lines = [json.dumps({"text": text, "source": name}, ensure_ascii=False) for name, text in documents]
    content = "".join(f"{line}\n" for line in lines).encode("utf-8")
    corpus = BuiltinCorpus(
        path,
        hashlib.sha256(content).hexdigest(),
        versions,
        len(documents),
        sum(len(text.encode("utf-8")) for _, text in documents),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, gzip.compress(content, compresslevel=6, mtime=0))
        # Last, so that a description always speaks of a whole file.
        write_json(
            _description(path),
            {"sha256": corpus.sha256, "versions": versions, "documents": corpus.documents, "bytes": corpus.bytes},
        )
    except (OSError, StorageError) as error:
        raise StorageError(
            f"the builtin corpus cannot be kept in {folder} ({error}); name another folder in data.cache or in the "
            "environment variable BLOCKLLM_CACHE"
        ) from error
    return corpus


@dataclass(frozen=True)
class Source:
    """One installed thing with documentation: the standard library ("python") or a package."""

    name: str
    version: str
    folder: Path


def installed_sources() -> list[Source]:
    """The standard library and the installed ones of `PACKAGES`; finding a package does not import it."""
    sources = [Source("python", platform.python_version(), Path(sysconfig.get_path("stdlib")))]
    for name in PACKAGES:
        try:
            found = importlib.util.find_spec(name)
            version = importlib.metadata.version(name)
        except (ImportError, ValueError):
            continue
        if found is not None and found.origin:
            sources.append(Source(name, version, Path(found.origin).parent))
    return sources


def harvest(sources: Sequence[Source], progress: Progress, should_stop: StopCheck) -> list[tuple[str, str]]:
    """(name, text) of every module with prose; a text is its paragraphs, one a line, no paragraph twice anywhere.

    The order is that of a hash of the module's name, which mixes the sources.

    Raises:
        StopRequested: `should_stop` became true.
    """
    files = list(_source_files(sources))
    known: set[str] = set()
    documents = []
    for done, (name, path) in enumerate(files):
        if should_stop():
            raise StopRequested
        progress(done, len(files))
        for part, strings in _documentation(path):
            paragraphs = []
            for string in strings:
                for paragraph in prose(string):
                    if paragraph not in known:
                        known.add(paragraph)
                        paragraphs.append(paragraph)
            if paragraphs:
                documents.append((f"{name}{part}", "\n".join(paragraphs)))
    progress(len(files), len(files))
    return sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest())


def prose(documentation: str) -> Iterator[str]:
    """The paragraphs of a docstring that read as English, each joined to one line.

    A paragraph counts if it has 80 characters, no sign of code, and three of four words are plain.
    """
    for lines in _paragraphs(inspect.cleandoc(documentation).expandtabs()):
        words = " ".join(lines).split()
        paragraph = " ".join(words)
        if len(paragraph) < MIN_PARAGRAPH_CHARACTERS or not paragraph.isprintable():
            continue
        if any(_CODE.search(line) for line in lines):
            continue
        plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
        if plain >= MIN_PLAIN_WORDS * len(words):
            yield paragraph


def _paragraphs(text: str) -> Iterator[list[str]]:
    """Lines between blank ones; a heading such as `Args:` is left out, and each entry under it is a paragraph."""
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        if lines and _HEADING.fullmatch(lines[0]):
            del lines[0]
        if not lines:
            continue
        outermost = min(_indent(line) for line in lines)
        paragraph: list[str] = []
        for line in lines:
            if paragraph and _indent(line) == outermost and _ENTRY.match(line):
                yield paragraph
                paragraph = []
            paragraph.append(line)
        yield paragraph


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _documentation(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Docstrings of one source file in order; of `pydoc_data.topics`, a table of texts, each text under its name."""
    try:
        content = path.read_bytes()
        if b'"""' not in content and b"'''" not in content and path.name != "topics.py":
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(content)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        for table in (node for node in ast.walk(tree) if isinstance(node, ast.Dict)):
            for key, value in zip(table.keys, table.values, strict=True):
                match key, value:
                    case ast.Constant(value=str(topic)), ast.Constant(value=str(text)):
                        yield f"#{topic}", [text]
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = (ast.get_docstring(node, clean=False) for node in nodes)
    yield "", [text for text in found if text]


def _source_files(sources: Sequence[Source]) -> Iterator[tuple[str, Path]]:
    """(name, path) of every source file in a fixed order; the name begins with that of the source."""
    for source in sources:
        inside = []
        for place, children, names in os.walk(source.folder):
            children[:] = [child for child in children if child not in SKIPPED_FOLDERS]
            inside += [Path(place, name) for name in names if name.endswith(".py")]
        yield from sorted((f"{source.name}/{path.relative_to(source.folder).as_posix()}", path) for path in inside)


def _from_cache(path: Path, versions: dict[str, str]) -> BuiltinCorpus | None:
    """The corpus at `path` if it is there, whole and as described."""
    try:
        described = json.loads(_description(path).read_text(encoding="utf-8"))
        corpus = BuiltinCorpus(
            path, str(described["sha256"]), versions, int(described["documents"]), int(described["bytes"])
        )
        content = gzip.decompress(path.read_bytes())
        return corpus if hashlib.sha256(content).hexdigest() == corpus.sha256 else None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
        return None


def _description(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".jsonl.gz") + ".json")
