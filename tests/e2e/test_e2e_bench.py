"""The bench with its own workers: a tiny model, each contestant in a process, from code and from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import speed
from speed.cases import OURS, Case, Contestant
from speed.results import load
from speed.rounds import run_case, starter

BENCH = Path(speed.__file__).parents[1]
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}

pytestmark = pytest.mark.slow


def spec_of(method: str, **more: Any) -> dict[str, Any]:
    return {"shape": TINY, "rows": 2, "length": 16, "precision": "bf16", "method": method, **more}


def test_our_own_workers_measure_a_tiny_model(tmp_path: Path) -> None:
    contestants = (
        Contestant("blockllm", OURS, "ours", spec_of("blockllm", options={"sparsity": 0.5}, ahead=2)),
        Contestant("update", OURS, "ours", spec_of("adamw", time="update")),
        Contestant("plain loop", OURS, "ours_plain_loop", spec_of("adamw")),
        Contestant("evaluation", OURS, "ours_evaluation", spec_of("adamw")),
        Contestant("load", OURS, "ours_checkpoint", spec_of("adamw", what="load")),
        Contestant("refused", OURS, "ours", spec_of("no such method")),
        Contestant("peer", "torch", "plain", spec_of("adamw")),
    )
    result = run_case(Case("tiny", contestants, 32, "tokens", rounds=(2, 2)), 0, starter(tmp_path, 1))
    states = {label: outcome.state for label, outcome in result.outcomes.items()}
    assert states == {each.label: "measured" for each in contestants} | {"refused": "failed", "peer": "absent"}
    assert "no such method" in result.outcomes["refused"].reason
    for label, outcome in result.outcomes.items():
        if outcome.state == "measured":
            assert len(outcome.repeats) == 2, label
            assert all(repeat["wall"] > 0 for repeat in outcome.repeats), label
    assert result.outcomes["blockllm"].repeats[-1]["untrained"] == pytest.approx(0.5, abs=0.1)
    assert result.outcomes["blockllm"].repeats[-1]["step"] == 6  # two ahead, two to warm up
    # Each entry is read and written with its two fp32 moments in bf16 weights, and its bf16 gradient read.
    last = result.outcomes["update"].repeats[-1]
    assert last["bytes"] == 22 * last["entries"]
    assert result.outcomes["load"].facts["bytes"] == 10 * last["entries"]


def test_the_command_measures_stores_and_prints(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "run.py"), "--only", "loss", "--case", "4096 pieces, bf16"]
    command += ["--minutes", "0", "--threads", "1", "--results", str(tmp_path), "--name", "here"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=tmp_path)
    found = load(tmp_path / "here.json").sections["loss"]
    (case,) = found.cases.values()
    assert {outcome.state for outcome in case.outcomes.values()} == {"measured"}
    assert {outcome.facts["threads"] for outcome in case.outcomes.values()} == {1}
    assert found.machine["torch"].startswith("2.")
    assert "| ours |" in done.stdout
