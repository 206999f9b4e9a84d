"""The builtin corpus: what counts as prose, and a cache that survives whatever happens to it."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from blockllm_cli.data import builtin
from blockllm_cli.data.builtin import BuiltinCorpus, Source, builtin_corpus, harvest, prose
from blockllm_cli.data.cache import default_cache_dir
from blockllm_cli.errors import InputError, StopRequested, StorageError

PLAIN = "The river keeps to its bed in the dry months, and nobody in the village remembers it ever did otherwise."
OTHER = "A second paragraph says something else, at enough length that it counts as prose and is not left out."


def texts(corpus: BuiltinCorpus) -> dict[str, str]:
    with gzip.open(corpus.path, "rt", encoding="utf-8") as file:
        return {document["source"]: document["text"] for document in map(json.loads, file)}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two small installed things in place of Python and the packages."""
    standard, package = tmp_path / "python3", tmp_path / "site-packages" / "pkg"
    for folder in (standard / "pydoc_data", standard / "test", package / "sub"):
        folder.mkdir(parents=True)
    (standard / "one.py").write_text(f'"""Short.\n\n    {PLAIN}\n"""\n', encoding="utf-8")
    (standard / "test" / "two.py").write_text(f'"""{PLAIN.replace("river", "stream")}"""\n', encoding="utf-8")
    (standard / "pydoc_data" / "topics.py").write_text(
        f"topics = {{'rivers': {OTHER!r}, 'none': 'x'}}", encoding="utf-8"
    )
    (standard / "broken.py").write_text(f'"""{PLAIN}""" is not (Python\n', encoding="utf-8")
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
    (package / "sub" / "mod.py").write_text(
        f'import torch\n\n\nclass A:\n    """{OTHER.replace("second", "third")}"""\n\n'
        f'    def f(self):\n        """{PLAIN}\n\n        {PLAIN.replace("river", "brook")}\n        """\n',
        encoding="utf-8",
    )
    monkeypatch.setattr(
        builtin, "installed_sources", lambda: [Source("python", "3.99", standard), Source("pkg", "1.0", package)]
    )
    return tmp_path


def test_one_document_per_module_and_topic_each_paragraph_once(sources: Path, tmp_path: Path) -> None:
    corpus = builtin_corpus(tmp_path / "cache")
    assert texts(corpus) == {
        "python/one.py": PLAIN,
        "python/pydoc_data/topics.py#rivers": OTHER,
        "pkg/sub/mod.py": OTHER.replace("second", "third") + "\n" + PLAIN.replace("river", "brook"),
    }
    assert corpus.versions == {"python": "3.99", "pkg": "1.0"}
    assert corpus.documents == 3
    assert corpus.bytes == sum(len(text.encode()) for text in texts(corpus).values())


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        f"    {PLAIN}",
        f"Summary.\n\n    {PLAIN}\n\n    >>> code()\n",
        PLAIN.replace(" in ", "\n    in "),
        f"Note:\n    {PLAIN}",
        f"Args:\n    x (int): short.\n    {PLAIN}".replace("    The", "    river: The").replace("short.", "short."),
    ],
)
def test_prose_is_found(text: str) -> None:
    assert list(prose(text)) in ([PLAIN], [f"river: {PLAIN}"])


@pytest.mark.parametrize(
    "text",
    [
        "Too short to be a paragraph.",
        ">>> " + PLAIN,
        f"{PLAIN} x = f(y)",
        f"- {PLAIN}",
        f"1. {PLAIN}",
        f".. note:: {PLAIN}",
        ":param x: " + PLAIN,
        "a1 b2 c3 d4 " * 9 + PLAIN,
        PLAIN.replace("village", "vil\ud800lage"),
        "",
    ],
)
def test_what_is_not_prose_is_left_out(text: str) -> None:
    assert list(prose(text)) == []


def test_three_of_four_words_must_be_plain() -> None:
    words = ["river"] * 30
    assert list(prose(" ".join(words + ["b2"] * 10)))
    assert not list(prose(" ".join(words + ["b2"] * 11)))


def test_the_cache_is_used_and_a_broken_one_is_made_again(sources: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = builtin_corpus(cache)
    harvests = []

    def again() -> BuiltinCorpus:
        return builtin_corpus(cache, progress=lambda done, total: harvests.append(done))

    assert again() == first
    assert harvests == []
    whole, described = first.path.read_bytes(), next(cache.rglob("*.json"))
    for damage in (
        lambda: first.path.write_bytes(whole[:-20]),
        lambda: first.path.write_bytes(gzip.compress(b"{}\n")),
        lambda: first.path.write_bytes(b"not gzip"),
        lambda: first.path.unlink(),
        lambda: described.write_text("{", encoding="utf-8"),
        lambda: described.write_text("[]", encoding="utf-8"),
        lambda: described.unlink(),
    ):
        damage()
        harvests.clear()
        assert again() == first
        assert harvests != []
        assert first.path.read_bytes() == whole
    assert sorted(path.suffix for path in cache.rglob("*") if path.is_file()) == [".gz", ".json"]


def test_other_versions_are_another_file(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = builtin_corpus(tmp_path / "cache")
    newer = [Source("python", "4.0", source.folder) for source in builtin.installed_sources()[:1]]
    monkeypatch.setattr(builtin, "installed_sources", lambda: newer)
    second = builtin_corpus(tmp_path / "cache")
    assert second.path != first.path
    assert first.path.exists()
    assert second.versions == {"python": "4.0"}


def test_two_that_harvest_at_once_agree(sources: Path, tmp_path: Path) -> None:
    """The inner one starts and ends while the outer one is at work."""
    inner: list[BuiltinCorpus] = []

    def progress(done: int, total: int) -> None:
        if done == 0:
            inner.append(builtin_corpus(tmp_path / "cache"))

    assert builtin_corpus(tmp_path / "cache", progress=progress) == inner[0]
    assert builtin_corpus(tmp_path / "cache") == inner[0]


def test_progress_ends_at_the_whole_and_a_stop_leaves_nothing_behind(sources: Path, tmp_path: Path) -> None:
    """R11: a stop while the corpus is gathered."""
    seen: list[tuple[int, int]] = []
    with pytest.raises(StopRequested):
        builtin_corpus(
            tmp_path / "cache",
            progress=lambda done, total: seen.append((done, total)),
            should_stop=lambda: len(seen) == 2,
        )
    assert len(seen) == 2
    assert not (tmp_path / "cache").exists()
    seen.clear()
    builtin_corpus(tmp_path / "cache", progress=lambda done, total: seen.append((done, total)))
    total = seen[0][1]
    assert seen == [(done, total) for done in range(total + 1)]


def test_a_cache_that_cannot_be_written_is_a_storage_error_with_the_way_out(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match=r"BLOCKLLM_CACHE") as caught:
        builtin_corpus(tmp_path / "file")
    assert caught.value.exit_code == 6


def test_python_without_its_sources_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "installed_sources", lambda: [Source("python", "3.99", tmp_path)])
    with pytest.raises(InputError, match=r"data\.corpus = \"files\""):
        builtin_corpus(tmp_path / "cache")


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("BLOCKLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "a home"))
    assert default_cache_dir() == tmp_path / "a home" / ".cache" / "blockllm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "blockllm"
    monkeypatch.setenv("BLOCKLLM_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"


def test_installed_sources_are_found_without_importing_them() -> None:
    code = (
        "import sys\nfrom blockllm_cli.data.builtin import installed_sources\n"
        "found = installed_sources()\n"
        "assert {'python', 'numpy', 'torch'} <= {s.name for s in found}, found\n"
        "assert all(s.version and s.folder.is_dir() for s in found), found\n"
        "assert not {'numpy', 'torch', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_blocked_package_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "datasets" not in {source.name for source in builtin.installed_sources()}


@pytest.mark.slow
def test_the_real_harvest_is_large_and_repeatable() -> None:
    sources = builtin.installed_sources()
    documents = harvest(sources, lambda done, total: None, lambda: False)
    assert sum(len(text) for _, text in documents) > 3_000_000
    paragraphs = [line for _, text in documents for line in text.splitlines()]
    assert len(paragraphs) == len(set(paragraphs))
    assert all(len(line) >= builtin.MIN_PARAGRAPH_CHARACTERS for line in paragraphs)
    assert sources[0].name == "python"
    standard = harvest(sources[:1], lambda done, total: None, lambda: False)
    assert standard == [document for document in documents if document[0].startswith("python/")]
