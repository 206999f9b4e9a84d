"""Makes the tables of docs/ from runs: runs what is missing, keeps each cell's summary, writes the page.

    python bench/tables.py --data DIR [--minutes 60]

DIR holds C4-shaped shards, `c4-train.*.json.gz` and `c4-validation.*.json.gz`. A cell that has been run for the same
recipe on the same rows is not run again: its summary lies under docs/data/short-runs/. What is still missing after
`--minutes` is listed on the page.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "docs" / "data" / "short-runs"
PAGE = ROOT / "docs" / "short-runs.md"
RECIPE = ROOT / "recipes" / "short-runs.toml"
KEPT = [
    "status",
    "method",
    "variant",
    "steps",
    "tokens",
    "slots",
    "loss",
    "train_loss",
    "perplexity",
    "perplexity_legacy",
    "unigram_perplexity",
    "memory",
    "planned_memory",
    "peak_rss_bytes",
    "tokens_per_second",
    "step_seconds_median",
    "parameters",
    "state_entries",
    "trainable_entries",
    "recipe_sha256",
    "train_rows_sha256",
    "validation_sha256",
    "tokenizer_sha256",
    "versions",
    "device",
    "seed",
]


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    key: str
    method: str
    learning_rate: float
    dense_rate: float | None = None

    def sets(self) -> list[str]:
        """Overrides that make this cell of the recipe."""
        chosen = [f"schedule.learning_rate={self.learning_rate:g}"]
        if self.dense_rate is not None:
            chosen.append(f"schedule.dense_rate={self.dense_rate:g}")
        return chosen

    def command(self) -> str:
        """The same run as a reader starts it."""
        sets = " ".join(f"--set {each}" for each in self.sets())
        data = "--set data.train=DIR/c4-train.*.json.gz --set data.validation=DIR/c4-validation.*.json.gz"
        return f"blockllm pretrain short-runs --method {self.method} {sets} {data}"


BEST = {"none": 1e-4, "normalized": 3e-4, "sign": 3e-4}
"""For each inactive rule the best rate of the matrices at sparsity 0.9, among those in the table."""

TABLE = (
    Cell("frozen-1e-2", "frozen", 1e-2),
    Cell("adamw-1e-3", "adamw", 1e-3),
    Cell("adamw-2e-3", "adamw", 2e-3),
    Cell("adamw-5e-3", "adamw", 5e-3),
    Cell("adamw-3e-4-dense-1e-2", "adamw", 3e-4, 1e-2),
    Cell("adamw-1e-3-dense-1e-2", "adamw", 1e-3, 1e-2),
    Cell("adamw-beta2-0.95-3e-4-dense-1e-2", "adamw:betas=[0.9,0.95]", 3e-4, 1e-2),
    Cell("frozen-beta2-0.95-1e-2", "frozen:betas=[0.9,0.95]", 1e-2),
    # BlockLLM: the rate is searched at sparsity 0.9, the rest runs at the best of these.
    *(
        Cell(f"blockllm-0.9-{inactive}-{rate:g}", f"blockllm:inactive={inactive}", rate, 1e-2)
        for inactive in BEST
        for rate in (1e-4, 3e-4, 1e-3)
    ),
    Cell("blockllm-0.9-none-0.003", "blockllm:inactive=none", 3e-3, 1e-2),
    *(
        Cell(f"blockllm-{sparsity}-{inactive}", f"blockllm:sparsity={sparsity},inactive={inactive}", rate, 1e-2)
        for sparsity in (0.5, 0.95)
        for inactive, rate in BEST.items()
    ),
    *(
        Cell(
            f"blockllm-paper-{sparsity}-{inactive}",
            f"blockllm:variant=paper,sparsity={sparsity},inactive={inactive}",
            rate,
            1e-2,
        )
        for sparsity in (0.9, 0.5, 0.95)
        for inactive, rate in BEST.items()
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("DATA"), help="folder with the shards")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no cell after this long")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells at a time")
    parser.add_argument("--page-only", action="store_true", help="write the page from the cells that exist")
    arguments = parser.parse_args()
    CELLS.mkdir(parents=True, exist_ok=True)
    if not arguments.page_only:
        if arguments.data is None:
            parser.error("--data DIR (or make tables DATA=DIR) names the folder with the shards")
        run_missing(arguments.data.resolve(), arguments.minutes * 60, arguments.jobs)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


def run_missing(data: Path, seconds: float, jobs: int) -> None:
    """Run the cells that have no summary for this recipe and this data."""
    description = describe_data(data)
    (CELLS / "data.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    began = time.monotonic()

    def fill(cell: Cell) -> None:
        path = CELLS / f"{cell.key}.json"
        wanted = {"command": cell.command(), "recipe": recipe, "data": description["sha256"]}
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["made_from"] == wanted:
            print(f"{cell.key}: done before")
        elif time.monotonic() - began > seconds:
            print(f"{cell.key}: left for another sitting")
        else:
            summary = run(cell, data)
            path.write_text(json.dumps({"made_from": wanted, **summary}, indent=2) + "\n", encoding="utf-8")

    recipe = hashlib.sha256(RECIPE.read_bytes()).hexdigest()
    # Each cell computes with one thread, so as many run side by side as there are cores.
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(fill, TABLE))


def run(cell: Cell, data: Path) -> dict[str, Any]:
    """Run one cell in a process of its own and return what is kept of its summary and environment."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "blockllm_cli", "pretrain", str(RECIPE), "--method", cell.method]
        command += ["--output", place, "--name", cell.key]
        for each in cell.sets():
            command += ["--set", each]
        print(" ".join(command), flush=True)
        done = subprocess.run(command, cwd=data, stdout=subprocess.PIPE, text=True, check=True)
        folder = Path(done.stdout.strip().splitlines()[-1])
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    print(f"{cell.key}: perplexity {summary['perplexity']:.2f}", flush=True)
    kept = {key: summary[key] for key in KEPT}
    kept["machine"] = {key: environment[key] for key in ("processor", "cores", "threads")}
    return kept


def describe_data(data: Path) -> dict[str, Any]:
    """Names, sizes and one hash over the shards."""
    shards = sorted(data.glob("c4-*.json.gz"))
    if not shards:
        raise SystemExit(f"{data} has no c4-train.*.json.gz")
    whole = hashlib.sha256()
    for shard in shards:
        whole.update(shard.name.encode() + b"\0" + hashlib.sha256(shard.read_bytes()).digest())
    return {"shards": len(shards), "bytes": sum(shard.stat().st_size for shard in shards), "sha256": whole.hexdigest()}


def page() -> str:
    """The page, from the cells that exist."""
    found = {cell: json.loads(path.read_text()) for cell in TABLE if (path := CELLS / f"{cell.key}.json").exists()}
    data = json.loads((CELLS / "data.json").read_text(encoding="utf-8"))
    frozen = next((s["perplexity"] for cell, s in found.items() if cell.method == "frozen"), None)
    heads = (
        "method",
        "rate of matrices",
        "rate of embedding, head, norms",
        "perplexity",
        "to frozen",
        "entries with state",
        "state MiB",
        "all counted MiB",
        "tokens/s",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for cell, summary in found.items():
        dense = cell.dense_rate if cell.dense_rate is not None else cell.learning_rate
        body = "-" if cell.method.startswith("frozen") else f"{cell.learning_rate:g}"
        ratio = f"{summary['perplexity'] / frozen:.3f}" if frozen else ""
        state = (summary["memory"]["optimizer_state"] + summary["memory"]["master_weights"]) / 2**20
        lines.append(
            f"| {cell.method} | {body} | {dense:g} | {summary['perplexity']:.1f} | {ratio} "
            f"| {summary['state_entries'] / 1e6:.2f}M | {state:.1f} "
            f"| {sum(filter(None, summary['memory'].values())) / 2**20:.1f} | {summary['tokens_per_second']:,.0f} |"
        )
    for key in ("train_rows_sha256", "validation_sha256"):
        if len({summary[key] for summary in found.values()}) > 1:
            raise SystemExit(f"the cells were not made on the same rows: {key} differs")
    better = [
        f"`{cell.method}` at {cell.learning_rate:g} ({summary['perplexity'] / frozen - 1:+.0%})"
        for cell, summary in found.items()
        if frozen and summary["perplexity"] < frozen and not cell.method.startswith("frozen")
    ]
    missing = [cell.key for cell in TABLE if cell not in found]
    any_run = next(iter(found.values()))
    machine = any_run["machine"]
    return INTRODUCTION.format(
        table="\n".join(lines),
        better=", ".join(better) or "none",
        missing=f"Missing: {', '.join(missing)}." if missing else "No cell is missing.",
        commands="\n".join(cell.command() for cell in TABLE),
        shards=data["shards"],
        megabytes=data["bytes"] / 1e6,
        data_sha256=data["sha256"],
        rows=any_run["train_rows_sha256"][:16],
        validation=any_run["validation_sha256"][:16],
        unigram=any_run["unigram_perplexity"],
        parameters=any_run["parameters"] / 1e6,
        tokens=any_run["tokens"] / 1e6,
        processor=machine["processor"],
        threads=machine["threads"],
        torch=any_run["versions"]["torch"],
    )


INTRODUCTION = """<!-- made by `make tables DATA=DIR`; change bench/tables.py, not this file -->
# Short runs on real text

{parameters:.1f}M parameters, {tokens:.2f}M target tokens, one seed. Runs this short order nothing: what they show is
how much of the fall in perplexity comes from embedding, head and norms alone (method `frozen`, all matrices stay as
they were drawn).

{table}

Rows that train the matrices and end below the control: {better}. In the others, training the matrices made things worse
than leaving them at random within these 600 updates; initial weights are drawn with one spread of 0.02, the embedding's
included, as in the papers' models.

{missing} Unigram perplexity on the same validation set: {unigram:.1f}. "state" counts moments and fp32 master copies;
"all counted" adds weights, kept gradients and indices, each at its largest.

## What it was made with

Recipe `short-runs` (`blockllm recipes show short-runs`), each row by one command:

```
{commands}
```

`make tables DATA=DIR` runs the cells that are missing and writes this page; each cell's summary is under
`docs/data/short-runs/`. Data: {shards} shards of gzipped JSON lines in C4's form, {megabytes:.1f} MB, sha256 over
names and contents `{data_sha256}`. Their composition
by characters: English web pages of C4 12 %, US government websites and blogs 31 %, US presidential addresses 8 %, one
open textbook 5 %, books in the public domain 43 %, in 7,789 training and 431 validation documents.
All cells saw the same training rows (sha256 `{rows}...`) and the same
validation rows (`{validation}...`). Machine: {processor}, {threads} thread(s) a cell, two cells side by side, torch
{torch}; other work ran beside some of them, so compare speeds only roughly.
"""


if __name__ == "__main__":
    raise SystemExit(main())
