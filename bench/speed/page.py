"""Puts tables into pages: what stands between two markers is made from results.

    <!-- bench epyc dense -->
    ...
    <!-- /bench -->

The first word names the results, the second the section.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from speed.results import SectionResult, load, path_of
from speed.sections import SECTIONS

PAGES = tuple(sorted((Path(__file__).parents[2] / "docs").glob("*.md")))
_PLACE = re.compile(r"(<!-- bench ([\w.-]+) ([\w-]+) -->\n)((?:(?!<!-- bench ).)*?)(<!-- /bench -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- /?bench\b")


def write(pages: Sequence[Path], results: Path, *, check: bool) -> int:
    """Bring the pages up to date; with `check` only say which are not, and return 1 then.

    Raises:
        ValueError: a marker stands alone, or names results or a section that are not there.
    """
    old = False
    for path in pages:
        text = path.read_text(encoding="utf-8")
        try:
            made = filled(text, results)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if made == text:
            continue
        old = True
        if check:
            print(f"out of date: {path}; run python bench/run.py --page")
        else:
            path.write_text(made, encoding="utf-8")
            print(f"wrote {path}")
    return 1 if check and old else 0


def filled(text: str, results: Path) -> str:
    """`text` with everything between markers made anew.

    Raises:
        ValueError: see `write`.
    """

    def table(place: re.Match[str]) -> str:
        begin, name, section, _, end = place.groups()
        path = path_of(name, results)
        found = load(path).sections if path.exists() else {}
        if section not in found or section not in SECTIONS:
            raise ValueError(f"{begin.strip()}: {path} has no section {section!r}")
        result = found[section]
        return f"{begin}{SECTIONS[section].table(result, 'wall')}\n\n{source_of(result)}\n{end}"

    made, places = _PLACE.subn(table, text)
    if 2 * places != len(_MARKER.findall(text)):
        raise ValueError("a marker stands alone: <!-- bench NAME SECTION --> and <!-- /bench --> belong together")
    return made


def source_of(result: SectionResult) -> str:
    """The line under a table: machine, threads, versions, commit, command."""
    here = result.machine
    changed = ", changed" if here.get("is_changed") else ""
    return (
        f"{here['processor']}, {result.threads} thread(s) of {here['cores']} core(s), "
        f"{here['memory_bytes'] / 2**30:.0f} GiB, torch {here['torch']} (MKL {here['mkl']}, oneDNN {here['onednn']}), "
        f"commit {here['commit'][:10]}{changed}, {result.when[:10]}, load before {here.get('load_before')}: "
        f"`python bench/run.py {result.command}`"
    )
