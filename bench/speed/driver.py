"""The driver: `python bench/run.py`.

Every section that `--only` names, or all of them, is measured within `--minutes`, stored in `bench/results/NAME.json`
as soon as it is done, and printed. Sections of an earlier sitting that were not measured again stay in the file.

    python bench/run.py --only dense blockllm --minutes 10
    python bench/run.py --only dense --case "60m, 4 x 256" --all --name epyc
    python bench/run.py --show                    # what is stored
    python bench/run.py --page                    # the tables in docs/, from the results
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from speed import machine, page
from speed.cases import Case, Choice, Section
from speed.client import BENCH
from speed.figures import Clock
from speed.results import FOLDER, SectionResult, load, path_of, store
from speed.rounds import Start, run_case, starter
from speed.sections import SECTIONS

MINUTES = 18.0
FOLDERS = {"--data": "DATA", "--peers": "PEERS", "--results": "RESULTS"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or with --page write tables; 0 unless --check finds an old page."""
    parser = _parser()
    options = parser.parse_args(arguments)
    path = path_of(options.name, options.results)
    try:
        if options.page or options.check:
            return page.write(options.pages, options.results, check=options.check)
        if options.show:
            return show(path, options.only or SECTIONS, options.clock)
        if path.exists():
            load(path)  # now, and not when there is something to lose
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    choice = Choice(options.all, options.data)
    start = starter(options.peers.absolute(), options.threads)
    chosen = [SECTIONS[name] for name in SECTIONS if name in (options.only or SECTIONS)]
    if options.case is not None:
        chosen = [section for section in chosen if _cases(section, choice, options.case)]
        if not chosen:
            parser.error(f"no case of these sections has {options.case!r} in its name (--all: more cases)")
    weights = [_weight(section, choice, options.case) for section in chosen]
    began = time.monotonic()
    for index, section in enumerate(chosen):
        left = max(0.0, options.minutes * 60 - (time.monotonic() - began))
        seconds = left * weights[index] / sum(weights[index:]) if weights[index] else 0.0
        print(f"\n## {section.name}: {section.title} ({seconds / 60:.1f} minutes)", flush=True)
        result = measure(section, choice, seconds, options.threads, start, only_case=options.case)
        result.command = _command(sys.argv[1:] if arguments is None else arguments)
        store(path, section.name, result)
        print(section.table(result, options.clock), flush=True)
    print(f"\nresults: {path}")
    return 0


def _command(arguments: Sequence[str]) -> str:
    """The arguments as a shell takes them, without the folders of this machine."""
    words = list(arguments)
    for index, word in enumerate(words):
        option, equals, _ = word.partition("=")
        if option in FOLDERS and equals:
            words[index] = f"{option}={FOLDERS[option]}"
        elif option in FOLDERS and index + 1 < len(words):
            words[index + 1] = FOLDERS[option]
    return shlex.join(words)


def show(path: Path, names: Iterable[str], clock: Clock) -> int:
    """Print the tables of stored results; 1 if there are none."""
    found = load(path).sections if path.exists() else {}
    for name in SECTIONS:
        if name in names and name in found:
            print(f"\n## {name}: {SECTIONS[name].title}\n\n{SECTIONS[name].table(found[name], clock)}")
            print(f"\n{page.source_of(found[name])}")
    if not found:
        print(f"{path} has no results", file=sys.stderr)
    return 0 if found else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--case", help="only cases whose name contains this; the section keeps no others")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all sections together ({MINUTES:.0f})")
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=cores, help=f"of every contestant (all cores: {cores})")
    parser.add_argument("--all", action="store_true", help="also cases that take long and say little")
    parser.add_argument("--data", help="folder with C4-shaped shards, for the section `data`")
    parser.add_argument("--name", default="local", help="of the results (local, which git ignores)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="seconds that are printed")
    parser.add_argument("--show", action="store_true", help="measure nothing: print what is stored under --name")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the tables of the pages")
    parser.add_argument("--check", action="store_true", help="as --page, but write nothing: 1 if a page is old")
    parser.add_argument("--pages", type=Path, nargs="+", default=page.PAGES, help="Markdown files; all of docs/")
    parser.add_argument("--peers", type=Path, default=BENCH.parent / ".bench", help="folder of the environments")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the results")
    return parser


def measure(
    section: Section, choice: Choice, seconds: float, threads: int, start: Start, only_case: str | None = None
) -> SectionResult:
    """One section within about `seconds`."""
    began, described = time.monotonic(), machine.describe()
    result = SectionResult(when="", seconds=0, command="", machine=described, threads=threads)
    if section.script is not None:
        script = section.script(choice)
        if script is None:
            result.reason = "not measured: it needs --data, a folder of C4-shaped shards"
        else:
            result.lines = _lines_of(script, threads)
    cases = _cases(section, choice, only_case)
    for index, case in enumerate(cases):
        left = max(0.0, seconds - (time.monotonic() - began))
        share = case.weight / sum(each.weight for each in cases[index:])
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        result.cases[case.name] = run_case(case, left * share, start)
    result.when = datetime.now(UTC).isoformat(timespec="seconds")
    result.seconds = round(time.monotonic() - began, 1)
    return result


def _cases(section: Section, choice: Choice, only_case: str | None) -> list[Case]:
    """The cases that were asked for, with the contestants that were asked for."""
    chosen = (
        replace(case, contestants=tuple(each for each in case.contestants if each.is_default or choice.everything))
        for case in section.cases()
        if only_case is None or only_case in case.name
    )
    return [case for case in chosen if case.contestants]


def _weight(section: Section, choice: Choice, only_case: str | None) -> float:
    if section.script is not None:
        return section.weight if section.script(choice) is not None else 0.0
    return sum(case.weight for case in _cases(section, choice, only_case))


def _lines_of(script: Sequence[str], threads: int) -> list[str]:
    """What a script of `bench/` prints; it has no part in the rationing of time."""
    command = [sys.executable, str(BENCH / script[0]), *script[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    lines = done.stdout.splitlines()
    return lines if done.returncode == 0 else [*lines, f"ended with {done.returncode}"]
