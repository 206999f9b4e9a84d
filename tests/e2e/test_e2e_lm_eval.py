"""lm-evaluation-harness on an exported model: its likelihood of an answer is that of the run (R35)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blockllm_cli.runner.finished import opened_run

BLOCKLLM = str(Path(sys.executable).with_name("blockllm"))

TASK = """
task: which_follows
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def likelihood(opened, context: str, continuation: str) -> float:
    """Of `continuation` after `context`, in nats, by the run's own model and tokenizer."""
    tokenizer = opened.tokenizer
    before, whole = (tokenizer.encode([text])[0].tolist() for text in (context, context + continuation))
    ids = torch.tensor([[tokenizer.bos_id, *whole]])
    with torch.inference_mode():
        log_probabilities = opened.model(ids)[0].double().log_softmax(-1)
    return sum(log_probabilities[position, ids[0, position + 1]].item() for position in range(len(before), len(whole)))


@pytest.mark.slow
def test_a_local_task_gets_the_likelihoods_of_the_run_r35(tiny, tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    run = tiny.run("schedule.steps=60", "data.sequence_length=128")
    subprocess.run(
        [BLOCKLLM, "export", str(run.folder), "--to", str(tmp_path / "model")],
        check=True,
        capture_output=True,
        timeout=300,
    )
    rows = [
        {"context": f"Document {number} begins. The", "good": good, "bad": bad}
        for number, (good, bad) in enumerate([(" river sees the", " qxzv ##jw zqkk"), (" qzwx## jvv", " river")] * 2)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "which_follows.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"), encoding="utf-8")
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lm_eval",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={tmp_path / 'model'},dtype=float32",
            "--tasks",
            "which_follows",
            "--include_path",
            str(tmp_path),
            "--device",
            "cpu",
            "--batch_size",
            "4",
            "--output_path",
            str(tmp_path / "results"),
            "--log_samples",
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    (samples,) = (tmp_path / "results").rglob("samples_*.jsonl")
    logged = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert len(logged) == len(rows)
    right = 0
    with opened_run(run.folder, step=None) as opened:
        for sample in logged:
            row = sample["doc"]
            theirs = [float(answer[0][0]) for answer in sample["resps"]]
            ours = [likelihood(opened, row["context"], row[answer]) for answer in ("good", "bad")]
            assert theirs == pytest.approx(ours, abs=1e-3)
            right += ours[0] > ours[1]
    assert 0 < right < len(rows)  # the task has to tell a right answer from a wrong one
    accuracy = json.loads(results.read_text())["results"]["which_follows"]["acc,none"]
    assert accuracy == pytest.approx(right / len(rows))
