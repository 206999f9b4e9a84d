"""Checks between keys of a recipe, each naming the one key to change. Single keys are checked by their section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isqrt

from blockllm_cli.recipe.kinds import literal
from blockllm_cli.recipe.layers import GOVERNED
from blockllm_cli.recipe.origins import Origin, Problem
from blockllm_cli.recipe.sections import Batch, Data, Schedule, Section, Tokenizer
from blockllm_cli.recipe.steps import steps_of


def cross_checks(sections: Mapping[str, Section], origins: Mapping[str, Origin]) -> Iterator[Problem]:
    """What is wrong between the keys of the tables that are valid by themselves.

    Args:
        sections: the valid tables; a table with problems of its own is absent, and so are the checks that need it.
        origins: tells which keys were given.
    """
    batch, schedule = sections.get("batch"), sections.get("schedule")
    data, tokenizer = sections.get("data"), sections.get("tokenizer")
    if isinstance(batch, Batch):
        yield from _batch(batch)
    if isinstance(schedule, Schedule):
        yield from _schedule(schedule, batch, data)
    if isinstance(tokenizer, Tokenizer):
        yield from _tokenizer(tokenizer)
    if isinstance(data, Data):
        yield from _data(data)
    for name, section in sections.items():
        yield from _unread(name, section, origins)


def _batch(batch: Batch) -> Iterator[Problem]:
    if batch.micro_rows is None or batch.rows % batch.micro_rows == 0:
        return
    rows, micro = batch.rows, batch.micro_rows
    small = [number for number in range(1, isqrt(rows) + 1) if rows % number == 0]
    divisors = [*small, *(rows // number for number in small)]
    below = max(number for number in divisors if number < micro)
    above = min((number for number in divisors if number > micro), default=below)
    multiples = [number for number in (rows // micro * micro, (rows // micro + 1) * micro) if number]
    yield Problem(
        "batch.micro_rows",
        f"is {micro}, which does not divide batch.rows {rows} ({rows} / {micro} = {rows / micro:.4g} passes)",
        f"the nearest that fit are micro_rows {_either(sorted({below, above}))}, or rows {_either(multiples)}",
    )


def _schedule(schedule: Schedule, batch: Section | None, data: Section | None) -> Iterator[Problem]:
    if schedule.steps is None and schedule.tokens is None:
        yield Problem("schedule.steps", "is missing", "give steps (updates), or tokens (slots) in its place")
        return
    if schedule.steps is not None and schedule.tokens is not None:
        text = f"is {schedule.tokens} beside steps = {schedule.steps}"
        yield Problem("schedule.tokens", text, "both set the length of the run; leave one out")
        return
    warmup = schedule.warmup
    if isinstance(warmup, float):
        if warmup >= 1:
            whole = f"write {warmup:.0f}" if warmup.is_integer() else "write an integer"
            yield Problem("schedule.warmup", f"is {warmup}, and a share must be below 1", f"{whole} to count updates")
        return
    if isinstance(batch, Batch) and isinstance(data, Data):
        steps = steps_of(schedule, batch, data)
        if warmup >= steps:
            text = f"is {warmup} updates, and the run has {steps}"
            yield Problem("schedule.warmup", text, f"give fewer than {steps}, or a share such as 0.1")


def _data(data: Data) -> Iterator[Problem]:
    if data.corpus == "files" and data.train is None:
        yield Problem("data.train", 'is missing, and corpus = "files" reads it', "give a glob such as texts/*.jsonl")
    if data.corpus == "hub" and data.repository is None:
        yield Problem("data.repository", 'is missing, and corpus = "hub" reads it', "give a dataset, as owner/name")


def _tokenizer(tokenizer: Tokenizer) -> Iterator[Problem]:
    if tokenizer.source == "train" and tokenizer.vocab_size is None:
        yield Problem("tokenizer.vocab_size", 'is missing, and source = "train" needs it', "give it, such as 4096")
    if tokenizer.source != "train" and tokenizer.path is None:
        what = (
            "the path of a sentencepiece model or a tokenizer.json"
            if tokenizer.source == "file"
            else "its name on the hub"
        )
        yield Problem("tokenizer.path", f'is missing, and source = "{tokenizer.source}" needs it', f"give {what}")


def _unread(name: str, section: Section, origins: Mapping[str, Origin]) -> Iterator[Problem]:
    """Keys that were given and that nothing would read."""
    for governor, keys in GOVERNED.items():
        table, _, selector = governor.partition(".")
        if table != name:
            continue
        chosen = getattr(section, selector)
        for key, readers in keys.items():
            if f"{name}.{key}" in origins and chosen not in readers:
                wanted = " or ".join(literal(reader) for reader in readers)
                text = f"nothing reads it with {selector} = {literal(chosen)}: it goes with {wanted}"
                yield Problem(f"{name}.{key}", text, f"leave it out, or change {governor}")


def _either(numbers: list[int]) -> str:
    return " or ".join(str(number) for number in numbers)
