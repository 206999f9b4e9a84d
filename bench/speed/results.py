"""What a sitting leaves: one JSON file a name, sections replaced as they are measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FORMAT = 1
FOLDER = Path(__file__).parents[1] / "results"


class Plain(BaseModel):
    """Base of what is stored: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class Outcome(Plain):
    """What became of a contestant.

    Attributes:
        peer: environment that it ran in.
        kind: what it is compared within.
        state: `absent` where its environment is missing, `failed` where it ended with an error.
        reason: of the latter two.
        versions: of the packages that it used.
        facts: what the worker said of itself.
        repeats: `wall` and `cpu` in seconds, in the order in which they were made, and what else the worker said.
    """

    peer: str
    kind: str = ""
    state: Literal["measured", "absent", "failed"] = "measured"
    reason: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    facts: dict[str, Any] = Field(default_factory=dict)
    repeats: list[dict[str, Any]] = Field(default_factory=list)


class CaseResult(Plain):
    """Outcomes by label, and what a repeat did, see `cases.Case`."""

    work: float
    unit: str
    outcomes: dict[str, Outcome]


class SectionResult(Plain):
    """One section of a sitting.

    Attributes:
        when: its end, UTC.
        seconds: it took.
        command: arguments of the driver.
        machine: see `machine.describe`.
        threads: of every contestant.
        cases: by name.
        lines: what a script printed.
        reason: why nothing was measured, where that is so.
    """

    when: str
    seconds: float
    command: str
    machine: dict[str, Any]
    threads: int
    cases: dict[str, CaseResult] = Field(default_factory=dict)
    lines: list[str] = Field(default_factory=list)
    reason: str = ""


class Results(Plain):
    """All of a name."""

    format: Literal[1] = 1
    sections: dict[str, SectionResult] = Field(default_factory=dict)


def path_of(name: str, folder: Path = FOLDER) -> Path:
    """Where the results of `name` are."""
    return folder / f"{name}.json"


def load(path: Path) -> Results:
    """What a file holds.

    Raises:
        ValueError: it is not what this version writes.
    """
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ValueError(f"{path} is not what this version writes: {error}") from error


def store(path: Path, section: str, result: SectionResult) -> None:
    """Put a section into the file, which is made if it is not there; other sections stay."""
    results = load(path) if path.exists() else Results()
    results.sections[section] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(results.model_dump_json(indent=1, exclude_defaults=True) + "\n", encoding="utf-8")
    beside.replace(path)  # what was there is not lost if this is cut off
