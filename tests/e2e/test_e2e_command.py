"""The installed command as a person meets it: output without a terminal, exit codes, odd places (R25, R31, R32)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BLOCKLLM = str(Path(sys.executable).with_name("blockllm"))
QUICK = ("--set", "schedule.steps=6", "--set", "schedule.warmup=0", "--set", "evaluate.every=3")


def test_output_without_a_terminal_is_whole_lines_r31(tiny):
    done = tiny.call(*QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\r" not in done.stdout
    assert "\x1b" not in done.stdout
    assert len(done.stdout) < 6000
    folder = Path(done.stdout.splitlines()[-1])
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"
    line = next(line for line in done.stdout.splitlines() if line.startswith("update 3/6"))
    assert re.search(r"loss \d+\.\d+ .*perplexity \d+.*tokens/s.* left", line)
    log = (folder / "log.txt").read_text()
    assert line in log
    assert "validation perplexity" in log


def test_a_place_with_spaces_and_umlauts_an_odd_name_and_spawned_workers_r32(tiny, tmp_path):
    home = tmp_path / "zu Hause bei Müller"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1", "LC_ALL": "C"}
    done = tiny.call(
        *QUICK, "--set", "data.workers=2", "--name", "a:b/c?", "--output", str(home / "Läufe"), env=environment
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    assert folder.parent == home / "Läufe" / "a-b-c"
    assert (folder / "summary.json").exists()


def test_text_is_utf8_under_lc_all_c_and_bad_rows_are_counted_r25(tiny, tmp_path):
    lines = [json.dumps({"text": f"Größe {i} größer als zuvor, naïve Übung"}, ensure_ascii=False) for i in range(80)]
    lines[10] = "{broken"
    lines[20] = json.dumps({"no": "text"})
    lines[30] = json.dumps({"text": ""})
    lines[40] = json.dumps({"text": "\x00 null \ud800 surrogate"})
    path = tmp_path / "mixed.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "caf\xe9"}\n')
    environment = {**os.environ, "LC_ALL": "C", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "0"}
    done = tiny.call(
        *QUICK,
        "--set",
        f"data.train={path}",
        "--set",
        "data.layout=truncate",
        "--set",
        "data.block_documents=256",
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    bad = {event["line"] for event in events if event["kind"] == "bad_document"}
    assert bad == {11, 21, 81}
    losses = [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()[1:]]
    assert all(loss is not None and loss < 20 for loss in losses)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--set", "schedule.stepps=3"], 2, ["stepps", "steps"]),
        (["--set", "data.train=nowhere/*.gz"], 3, ["data.train", "nowhere/*.gz"]),
        (["--set", "tokenizer.path=nowhere.model"], 3, ["nowhere.model"]),
        (["--set", "batch.micro_rows=3"], 2, ["8", "3", "4"]),
        (["--method", "adamww"], 2, ["adamww", "adamw"]),
        (["--resume", "latest"], 3, ["no run to resume"]),
        (["--output", "/proc/nowhere"], 6, ["/proc/nowhere"]),
    ],
)
def test_failures_are_one_message_and_leave_nothing(tiny, arguments, code, words):
    done = tiny.call(*QUICK, *arguments)
    assert done.returncode == code, (done.returncode, done.stderr)
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tiny.folder / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_outside_r11(tiny, number):
    process = subprocess.Popen(
        tiny.command("--set", "schedule.steps=100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("update 5/"):
            break
    process.send_signal(number)
    began = time.monotonic()
    process.stdout.read()
    stderr = process.stderr.read()
    assert process.wait() == 128 + number
    assert time.monotonic() - began < 60
    folder = re.search(r"blockllm pretrain --resume (\S+)", stderr).group(1)
    assert json.loads((Path(folder) / "summary.json").read_text())["status"] == "stopped"
    again = subprocess.run(
        [BLOCKLLM, "pretrain", "--resume", folder, "--stop-after", "200"], capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    process.stdout.close()
    process.stderr.close()


def test_evaluate_reads_a_run_back(tiny):
    run = tiny.run("schedule.steps=30")
    done = subprocess.run(
        [BLOCKLLM, "evaluate", str(run.folder), "--json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["perplexity"] == run.summary["perplexity"]
    assert result["validation_sha256"] == run.summary["validation_sha256"]


def test_generate_continues_a_prompt(tiny):
    run = tiny.run("schedule.steps=10")
    made = subprocess.run(
        [BLOCKLLM, "generate", str(run.folder), "--prompt", "Document 12", "--tokens", "8", "--temperature", "0"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("Document 12")
    assert len(made.stdout) > len("Document 12\n")


def test_training_from_files_needs_no_datasets_wandb_pyarrow_transformers(tiny):
    program = (
        "import sys\n"
        "for name in ('datasets', 'wandb', 'pyarrow', 'transformers'):\n    sys.modules[name] = None\n"
        "from blockllm_cli.app import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, *tiny.command(*QUICK)[1:]]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
