"""The table that closes a run, and what to try next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from blockllm_cli.tracking.run_folder import RECIPE, RunFolder
from blockllm_cli.tracking.terminal import Terminal
from blockllm_cli.units import format_bytes, format_count, format_seconds


def show_outcome(folder: Path, terminal: Terminal) -> None:
    """Print the figures of summary.json and the next commands."""
    summary = RunFolder(folder).summary()
    if summary is None:
        return
    terminal.table(f"{summary['name']} ({summary['method']}): {summary['status']}", _rows(summary))
    for line in _next_steps(folder, summary):
        terminal.say(line)


def _rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("updates", f"{summary['steps']:,}"),
        ("target tokens", format_count(summary["tokens"])),
        ("parameters", format_count(summary["parameters"])),
    ]
    if summary["perplexity"] is not None:
        rows.append(("validation perplexity", f"{summary['perplexity']:.2f} (loss {summary['loss']:.4f})"))
    if summary["perplexity_legacy"] is not None:
        rows.append(("as the literature computes it", f"{summary['perplexity_legacy']:.2f}"))
    if summary["perplexity"] is not None and summary["unigram_perplexity"] is not None:
        share = summary["perplexity"] / summary["unigram_perplexity"]
        rows.append(("unigram perplexity", f"{summary['unigram_perplexity']:.2f} (the model's is {share:.2f} of it)"))
    if summary["tokens_per_second"] is not None:
        rows.append(("speed", f"{summary['tokens_per_second']:,.0f} target tokens/s"))
        rows.append(("update", f"{format_seconds(summary['step_seconds_median'])} (median)"))
    rows += [
        (name.replace("_", " "), format_bytes(count))
        for name, count in summary["memory"].items()
        if count  # null where nothing counts it, zero where there is none
    ]
    if summary["state_entries"] is not None:
        rows.append(("entries with state", format_count(summary["state_entries"])))
    rows.append(("largest resident memory", format_bytes(summary["peak_rss_bytes"])))
    return rows


def _next_steps(folder: Path, summary: dict[str, Any]) -> list[str]:
    if summary["status"] == "stopped":
        return [f"next: {RunFolder(folder).resume_command}"]
    lines = [f'next: blockllm generate {shlex.quote(str(folder))} --prompt "The"']
    if summary["method"] != "frozen":
        recipe = shlex.quote(str(folder / RECIPE))
        control = f"blockllm pretrain {recipe} --method frozen --name {summary['name']}-frozen"
        lines.append(f"      {control}   (what training no matrix gives)")
    return lines
