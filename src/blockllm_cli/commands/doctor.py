"""`blockllm doctor`: what this machine is and has, before a run finds out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockllm_cli.commands.options import JsonOption
from blockllm_cli.commands.output import print_json
from blockllm_cli.units import format_bytes


def doctor(
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder that runs would be written to; its disk is looked at.")
    ] = Path("runs"),
    network: Annotated[
        bool, typer.Option("--network/--no-network", help="Ask the Hugging Face hub for an answer, for at most 5 s.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Look at this machine: versions, devices and their speed, memory, disk, network, credentials (yes or no).

    Example: blockllm doctor --no-network
    """
    from blockllm_cli.commands.diagnosis import diagnose

    found = diagnose(output, network=network)
    if as_json:
        print_json(found)
    else:
        print(_page(found))


def _page(found: dict[str, Any]) -> str:
    lines = [_line("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items()))]
    missing = [name for name, version in found["optional"].items() if version is None]
    lines += [_line("not installed", ", ".join(missing) + " (some commands need them)")] if missing else []
    lines += [
        _line("system", f"{found['platform']}, {found['processor']}"),
        _line("cores", f"{found['cores']}, all used unless run.threads says otherwise"),
        _line("memory", "{} free of {}".format(*(format_bytes(found["memory"][key]) for key in _MEMORY))),
    ]
    lines += [_line(device["device"], _device(device)) for device in found["devices"]]
    lines += [
        _line(f"disk ({use})", f"{format_bytes(disk['free_bytes'])} free at {disk['path']}")
        for use, disk in found["disk"].items()
    ]
    lines += [
        _line("hub", ("reachable: " if found["hub"]["reachable"] else "") + found["hub"]["detail"]),
        _line("W&B key", _yes_or_no(found["credentials"]["wandb"])),
        _line("HF token", _yes_or_no(found["credentials"]["huggingface"])),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in found["notes"])])


_MEMORY = ("available_bytes", "total_bytes")


def _device(device: dict[str, Any]) -> str:
    memory = f"{device['name']}, {format_bytes(device['memory_bytes'])}; " if "name" in device else ""
    if "problem" in device:
        return f"{memory}does not work: {device['problem']}"
    bf16 = f"{device['bf16_flops'] / 1e9:,.0f}" if device["bf16_flops"] else "no"
    return (
        f"{memory}matrix products: fp32 {device['fp32_flops'] / 1e9:,.0f} GFLOP/s, bf16 {bf16} GFLOP/s; "
        f'precision "auto" is {device["precision_auto"]}'
    )


def _line(label: str, text: str) -> str:
    return f"{label:<14} {text}"


def _yes_or_no(there: bool) -> str:
    return "found" if there else "none"
