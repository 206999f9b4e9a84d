"""The command under a pseudo terminal, in odd environments, and interrupted from its keyboard (R11, R31)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.screen import VARIABLES, OnScreen

BLOCKLLM = str(Path(sys.executable).with_name("blockllm"))
FULL = Path("/dev/full")
SHORT = ("--set", "schedule.steps=6", "--set", "schedule.warmup=0", "--set", "evaluate.every=3")
REDRAWN = re.compile(r"━|─ |\d+/\d+ · |tokens/s · |weights \d")

COUNTING = """
import sys, time
from blockllm_cli.tracking.terminal import Terminal
from blockllm_cli.training.signals import StopFlag
from blockllm_cli.errors import InterruptedRunError

def main(heeds):
    with Terminal() as terminal, StopFlag(terminal) as stop:
        with terminal.progress("counting the grains of sand", total=1000, unit="grains") as step:
            for number in range(1000):
                step.advance()
                if number == 20: terminal.say("a line in between that is longer than a narrow terminal is wide, much")
                if stop() and heeds: raise InterruptedRunError("stopped", stop.signal_number)
                time.sleep(0.05)

try:
    main(sys.argv[1] == "heeds")
except InterruptedRunError as error:
    print(error, file=sys.stderr); sys.exit(error.status)
"""


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_ctrl_c_takes_the_display_away_and_leaves_whole_lines_r11(columns):
    with OnScreen([sys.executable, "-c", COUNTING, "heeds"], columns) as program:
        program.read_until("in between")
        assert not program.screen.has_cursor
        program.press(b"\x03")
        assert program.end() == 130
    screen = program.screen
    words = "".join(screen.text.replace("^C", "").split())
    assert words == "alineinbetweenthatislongerthananarrowterminaliswide,muchstopped"
    assert screen.has_cursor


def test_a_second_ctrl_c_leaves_at_once_and_gives_the_cursor_back_r11():
    with OnScreen([sys.executable, "-c", COUNTING, "is deaf"]) as program:
        program.read_until("in between")
        program.press(b"\x03")
        program.read_until("once more to leave at once")
        program.press(b"\x03")
        assert program.end() == 130
    assert program.screen.has_cursor
    assert "Traceback" not in program.output


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 120])
def test_a_run_on_a_terminal_leaves_no_bar_behind(tiny, columns):
    with OnScreen(tiny.command(*SHORT), columns) as program:
        assert program.end() == 0, program.output
    screen = program.screen
    assert screen.has_cursor
    assert "3/6" in program.output
    assert not REDRAWN.search(screen.text), screen.text
    folder = str(tiny.newest().folder)
    assert screen.text.replace("\n", "").endswith(folder)
    for step in (0, 3, 6):
        assert len(re.findall(f"^update {step}/6", screen.text, re.M)) == 1
    assert all(len(line) <= columns for line in screen.text.split("\n"))


@pytest.mark.slow
def test_ctrl_c_in_a_run_on_a_terminal_r11(tiny):
    with OnScreen(tiny.command("--set", "schedule.steps=100000")) as program:
        program.read_until("20/100000")
        program.press(b"\x03")
        assert program.end() == 130, program.output
    screen = program.screen
    assert not REDRAWN.search(screen.text), screen.text
    assert screen.has_cursor
    one = screen.text.replace("\n", "")
    saved = int(re.search(r"interrupted: stopped at update (\d+) and saved; continue with: ", one)[1])
    assert one.endswith(f"blockllm pretrain --resume {tiny.newest().folder}")
    assert tiny.newest().summary["steps"] == saved
    assert "SIGINT: stopping in order" in (tiny.newest().folder / "log.txt").read_text()


@pytest.mark.slow
def test_a_dumb_terminal_gets_the_lines_of_a_file(tiny):
    with OnScreen(tiny.command(*SHORT), 40, {"TERM": "dumb"}) as program:
        assert program.end() == 0
    assert "\x1b" not in program.output
    assert "\r" not in program.output.replace("\r\n", "\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables", [{"FORCE_COLOR": "1", "TERM": "xterm-256color"}, {"COLUMNS": "20", "NO_COLOR": "1"}]
)
def test_a_file_gets_whole_lines_whatever_the_environment_asks_r31(tiny, variables):
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = tiny.call(*SHORT, env={**kept, "OMP_NUM_THREADS": "1", **variables})
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert re.search(r"^update 3/6 .*perplexity \d+.*tokens/s.* left", done.stdout, re.M)
    assert done.stdout.splitlines()[-1] == str(tiny.newest().folder)


@pytest.mark.slow
def test_a_signal_while_the_builtin_corpus_is_read_r11(tmp_path):
    environment = {**os.environ, "BLOCKLLM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [BLOCKLLM, "pretrain", "quickstart", "--output", str(tmp_path / "runs")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        line = process.stdout.readline()  # the first sign of life, after ten seconds
        assert re.fullmatch(r"reading the builtin corpus: [\d,]+/[\d,]+ source files, \d+ %, .* left\n", line)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        rest, errors = process.communicate(timeout=300)
    assert process.returncode == 143
    assert time.monotonic() - began < 60
    assert rest == ""
    assert "interrupted: stopped before the first update; nothing was written; run the same command again" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_stdout_can_be_used_by_a_script(tiny):
    """`folder=$(blockllm pretrain RECIPE --quiet)`, and the same with --json."""
    quiet = tiny.call(*SHORT, "--quiet")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert quiet.stdout == f"{tiny.newest().folder}\n"
    told = tiny.call(*SHORT, "--json")
    assert told.returncode == 0
    assert json.loads(told.stdout) == {"run": str(tiny.newest().folder)} | tiny.newest().summary
    assert "update 6/6" in told.stderr


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("recipes", "list"), 6), (("--help",), 6), (("--version",), 6), (("pretrain", "nowhere.toml"), 2)],
)
def test_a_stream_without_room_is_no_bug_r10(tmp_path, arguments, code):
    command = [sys.executable, "-m", "blockllm_cli", *arguments]
    with FULL.open("wb") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        both = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=full, check=False)
    assert (done.returncode, both.returncode) == (code, code)
    assert len(done.stderr.splitlines()) == 1
    assert ("cannot write to stdout: No space left on device" in done.stderr) == (code == 6)


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_run_goes_on_where_its_lines_find_no_room(tiny):
    with FULL.open("wb") as full:
        done = subprocess.run(
            tiny.command(*SHORT),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (6, "error: cannot write to stdout: No space left on device\n")
    assert tiny.newest().summary["status"] == "completed"
    assert "validation perplexity" in (tiny.newest().folder / "log.txt").read_text()


def test_help_whose_reader_has_gone_ends_like_any_other_command():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "blockllm_cli", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_without_stderr_an_error_does_not_go_to_stdout(tmp_path):
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m blockllm_cli pretrain nowhere.toml 2>&-"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, b"")


def test_bash_completes_what_the_command_offers(tmp_path):
    lines = (
        'eval "$("$0" --show-completion bash)"',
        "COMP_WORDS=(blockllm pretrain qui); COMP_CWORD=2",
        '_blockllm_completion "$0"; echo "${COMPREPLY[@]}"',
        "complete -p blockllm",
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", "; ".join(lines), BLOCKLLM], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.stdout.splitlines() == ["quickstart", "complete -o default -F _blockllm_completion blockllm"]
    assert done.stderr == ""
    shown = subprocess.run([BLOCKLLM, "--show-completion", "bash"], capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, "")
    asked = dict(os.environ, _BLOCKLLM_COMPLETE="complete_bash", COMP_WORDS="blockllm pretrain qui", COMP_CWORD="2")
    offered = subprocess.run([BLOCKLLM], env=asked, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (offered.returncode, offered.stdout.split()) == (0, ["quickstart"])
