"""Writes docs/reference/ from the code: every key of a recipe, every method, every command; a test compares.

python docs/build.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from blockllm_cli.app import COMMANDS, load_command
from blockllm_cli.methods.registry import method_class, method_names
from blockllm_cli.recipe.kinds import allowed
from blockllm_cli.recipe.sections import SECTIONS

REFERENCE = Path(__file__).parent / "reference"
NOTICE = "<!-- written by `make docs` from the code; change that, not this file -->\n"


def main() -> int:
    """Write the pages, or with --check say which are not what the code says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    check = parser.parse_args().check
    stale = []
    for name, text in pages().items():
        path = REFERENCE / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            REFERENCE.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run make docs")
    return 1 if check and stale else 0


def pages() -> dict[str, str]:
    """File name -> text of each reference page."""
    return {"recipe.md": recipe_page(), "methods.md": methods_page(), "commands.md": commands_page()}


def recipe_page() -> str:
    """All tables and keys of a recipe."""
    parts = [
        NOTICE,
        "# Keys of a recipe\n",
        "A key that a recipe leaves out has the default; `-` means that absence has the meaning the last column gives. "
        "The keys of `[method]` are those of the method, see [methods](methods.md).\n",
    ]
    for name, section in SECTIONS.items():
        parts.append(f"## `[{name}]`\n")
        parts.append(_table(section.model_fields))
    return "\n".join(parts)


def methods_page() -> str:
    """All methods with their facts and options."""
    parts = [NOTICE, "# Methods\n"]
    for name in method_names():
        method = method_class(name)
        facts = method.facts
        parts += [
            f"## `{name}`: {facts.title}\n",
            f"{facts.summary}\n",
            f"- Source: {facts.paper}",
            f"- Family: {facts.family}",
            f"- Kept of the gradient: {facts.keeps}",
            *(f"- {limit}" for limit in facts.limits),
            "",
            "Rates used where a recipe gives none (of the size that is nearest in parameters):\n",
            "| size | learning_rate | dense_rate | clip | from |",
            "|---|---|---|---|---|",
        ]
        for size, values in facts.hyperparameters.items():
            dense = "-" if values.dense_rate is None else f"{values.dense_rate:g}"
            parts.append(f"| {size} | {values.learning_rate:g} | {dense} | {values.clip:g} | {values.source} |")
        parts += ["", _table(method.Options.model_fields)]
    return "\n".join(parts)


def commands_page() -> str:
    """All commands with their arguments and options, from the same texts as `--help`."""
    parts = [NOTICE, "# Commands\n", "What all of them have in common stands in [the command line](../cli.md).\n"]
    for name, entry in COMMANDS.items():
        command = load_command(name)
        inside = getattr(command, "commands", None)
        parts += [f"## `blockllm {name}`\n", *([f"{entry.summary}\n"] if inside else [])]
        for called, one in (inside or {"": command}).items():
            full = f"blockllm {name} {called}".rstrip()
            about, _, example = (one.help or "").partition("\n\nExample: ")
            parts += [f"### `{full}`\n"] if called else []
            parts += [f"{about}\n", f"```sh\n{example}\n```\n", _parameters(one.params)]
    return "\n".join(parts)


def _parameters(parameters: list[Any]) -> str:
    """Arguments and options; their types are not shown, whose names change with the version of typer."""
    lines = ["| argument or option | meaning | default |", "|---|---|---|"]
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            name = parameter.metavar or parameter.name.upper()
        else:
            name = " ".join([", ".join([*parameter.opts, *parameter.secondary_opts]), parameter.metavar or ""]).rstrip()
        shown = "required" if parameter.required else _default(parameter.default)
        lines.append(f"| `{_cell(name)}` | {_cell(parameter.help or '')} | {shown} |")
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    return "on" if value is True else "-" if value is None or value is False or value == "" else str(value)


def _table(fields: dict[str, FieldInfo]) -> str:
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for key, field in fields.items():
        default = "required" if field.is_required() else _literal(field.get_default(call_default_factory=True))
        lines.append(f"| `{key}` | {_cell(allowed(field))} | {default} | {_cell(field.description or '')} |")
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
