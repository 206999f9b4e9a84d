import io
import re

from rich.console import Console

from blockllm_cli.tracking.log import RunLog
from blockllm_cli.tracking.terminal import Terminal

ROW = {
    "step": 20, "train/tokens": 40_960, "train/loss": 5.25, "train/gradient_norm": 0.5, "train/learning_rate": 1e-3,
    "throughput/tokens_per_second": 8123.4, "memory/rss_bytes": 2**30, "memory/weights_bytes": 2**20,
}  # fmt: skip


STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  ", re.M)


def shown(folder, *, is_terminal, width=200, evaluate=False):
    printed = io.StringIO()
    console = Console(
        file=printed,
        force_terminal=is_terminal,
        force_interactive=is_terminal,
        width=width,
        highlight=False,
        soft_wrap=True,
    )
    terminal = Terminal(console)
    terminal.say("before the folder exists")
    terminal.log_to(RunLog(folder / "log.txt"))
    terminal.start_live(steps=100, done=0)
    for step in range(1, 21):
        terminal.advance(step)
    terminal.row(ROW | ({"eval/perplexity": 190.5} if evaluate else {}))
    terminal.table("the end", [("perplexity", "1.5"), ("x", "y")])
    terminal.close()
    return printed.getvalue(), (folder / "log.txt").read_text(encoding="utf-8")


def test_without_a_terminal_each_row_is_one_whole_line_r31(tmp_path):
    printed, log = shown(tmp_path, is_terminal=False)
    assert "\r" not in printed
    assert "\x1b" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("update")]
    assert len(lines) == 1
    assert lines[0].startswith("update 20/100  41.0k tokens  loss 5.2500  norm 0.500  rate 1.00e-03  8,123 tokens/s")
    assert "left" in lines[0]
    assert STAMP.sub("", log) == printed
    assert len(STAMP.findall(log)) == len(log.splitlines())


def test_on_a_terminal_rows_are_shown_in_place_and_logged_whole(tmp_path):
    printed, log = shown(tmp_path, is_terminal=True)
    assert "20/100" in printed
    assert "loss 5.250" in printed
    assert "weights 1.00 MiB" in printed
    assert "update 20/100" not in printed
    assert "update 20/100  41.0k tokens" in log
    assert "before the folder exists" in log
    assert "\x1b" not in log


def test_an_evaluation_leaves_a_line_on_a_terminal_too(tmp_path):
    assert "perplexity 190.50" in shown(tmp_path, is_terminal=True, evaluate=True)[0]


def test_everything_fits_80_columns(tmp_path):
    printed, _ = shown(tmp_path, is_terminal=True, width=80, evaluate=True)
    assert "loss 5.250 · perplexity 190.50" in printed
    assert "8,123 tokens/s · rss 1.00 GiB" in printed
    assert "weights 1.00 MiB" in printed
    assert "…" not in printed


def test_a_narrow_terminal_is_no_reason_to_fail(tmp_path):
    assert "the end" in shown(tmp_path, is_terminal=True, width=20)[0]


def test_square_brackets_are_text():
    printed = io.StringIO()
    Terminal(Console(file=printed)).say("set [method] name [red]x[/red]")
    assert printed.getvalue().strip() == "set [method] name [red]x[/red]"
