import io
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from blockllm_cli.errors import InputError, InterruptedRunError, StorageError
from blockllm_cli.tracking.log import RunLog
from blockllm_cli.tracking.terminal import Terminal

ROW = {
    "step": 20,
    "train/tokens": 40_960,
    "train/loss": 5.25,
    "train/gradient_norm": 0.5,
    "train/learning_rate": 1e-3,
    "throughput/tokens_per_second": 8123.4,
    "memory/rss_bytes": 2**30,
    "memory/weights_bytes": 2**20,
}


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


def test_words_between_colons_are_text():
    printed = io.StringIO()
    Terminal(Console(file=printed)).say("a:smile:b 12")
    assert printed.getvalue() == "a:smile:b 12\n"


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@dataclass
class Desk:
    """A terminal, what it printed, warned and logged, and its clock."""

    folder: Path
    is_live: bool = False
    quiet: bool = False

    def __post_init__(self):
        self.out, self.err, self.clock = io.StringIO(), io.StringIO(), Clock()
        live = {"force_terminal": self.is_live, "force_interactive": self.is_live}
        self.terminal = Terminal(
            Console(file=self.out, width=100, **live),
            warnings=Console(file=self.err, width=100, force_terminal=False),
            quiet=self.quiet,
            clock=self.clock,
        )

    def wait(self, seconds):
        """Seconds pass, and the terminal's thread looks once in each."""
        for _ in range(seconds):
            self.clock.now += 1
            self.terminal.tick()

    @property
    def lines(self):
        return self.out.getvalue().splitlines()

    @property
    def log(self):
        self.terminal.log_to(RunLog(self.folder / "log.txt"))
        return STAMP.sub("", (self.folder / "log.txt").read_text(encoding="utf-8")).splitlines()


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.setattr("blockllm_cli.tracking.terminal.TICK_SECONDS", 1e9)  # `wait` ticks
    made = []

    def make(**options):
        made.append(Desk(tmp_path, **options))
        return made[-1]

    yield make
    for each in made:
        each.terminal.close()


def test_a_short_step_says_nothing_and_is_logged(desk):
    desk = desk()
    with desk.terminal.progress("evaluating", total=10, unit="rows") as step:
        desk.wait(1)
        step.advance(10)
    assert desk.lines == []
    assert desk.log == ["evaluating ...", "evaluating: 10 rows in 1.0 s"]


def test_a_long_step_leaves_whole_lines_at_intervals_r31(desk):
    desk = desk()
    with desk.terminal.progress("evaluating", total=100, unit="rows") as step:
        for _ in range(50):
            step.advance(2)
            desk.wait(1)
    assert desk.lines == [
        "evaluating: 20/100 rows, 20 %, 40.0 s left",
        "evaluating: 40/100 rows, 40 %, 30.0 s left",
        "evaluating: 60/100 rows, 60 %, 20.0 s left",
        "evaluating: 80/100 rows, 80 %, 10.0 s left",
        "evaluating: 100/100 rows, 100 %",
        "evaluating: 100 rows in 50.0 s",
    ]
    assert desk.log == ["evaluating ...", *desk.lines]


def test_a_step_that_tells_nothing_is_heard_of_all_the_same(desk):
    desk = desk()
    with desk.terminal.progress("training a tokenizer"):
        desk.wait(25)
    assert desk.lines == [
        "training a tokenizer: 10.0 s so far",
        "training a tokenizer: 20.0 s so far",
        "training a tokenizer: 25.0 s",
    ]


def test_a_day_of_work_is_a_bounded_number_of_lines(desk):
    desk = desk()
    with desk.terminal.progress("tokenising"):
        desk.wait(24 * 3600)
    assert 24 * 60 - 30 < len(desk.lines) < 24 * 60 + 60


def test_what_is_said_meanwhile_counts_as_a_sign_of_life(desk):
    desk = desk()
    with desk.terminal.progress("reading"):
        desk.wait(9)
        desk.terminal.say("a bad document")
        desk.wait(9)
        assert desk.lines == ["a bad document"]
        desk.wait(1)
        assert desk.lines[-1] == "reading: 19.0 s so far"


def test_a_step_that_fails_is_closed_in_the_log(desk):
    desk = desk()
    with pytest.raises(KeyError), desk.terminal.progress("reading", total=10, unit="files") as step:
        step.update(3)
        raise KeyError
    assert desk.lines == []
    assert desk.log == ["reading ...", "reading: not finished (3 files, 0 ms)"]
    desk.wait(100)
    assert desk.lines == []


def test_the_inner_of_two_steps_is_told(desk):
    desk = desk()
    with desk.terminal.progress("outer"):
        with desk.terminal.progress("inner"):
            desk.wait(10)
        assert desk.lines == ["inner: 10.0 s so far", "inner: 10.0 s"]
        desk.wait(10)
        assert desk.lines[2:] == ["outer: 20.0 s so far"]


def test_slow_updates_leave_a_line_a_minute_r31(desk):
    desk = desk()
    desk.terminal.start_live(steps=10, done=2)
    desk.wait(59)
    assert desk.lines == []
    desk.wait(1)
    desk.terminal.advance(3)
    desk.wait(60)
    assert desk.lines == [
        "training: 2/10 updates done, 1 min 00 s so far",
        "training: 3/10 updates done, 2 min 00 s so far, 14 min 00 s left",
    ]
    desk.terminal.row(ROW)
    desk.wait(59)
    assert len(desk.lines) == 3


def test_an_evaluation_inside_of_training_is_told_when_it_is_long_only(desk):
    desk = desk()
    desk.terminal.start_live(steps=100, done=0)
    for seconds in (5, 15):
        with desk.terminal.progress("evaluating", total=10, unit="rows") as step:
            step.update(5)
            desk.wait(seconds)
        desk.terminal.row(ROW)
    assert desk.lines[1] == "evaluating: 5/10 rows, 50 %, 10.0 s left"
    assert [line[:6] for line in desk.lines] == ["update", "evalua", "update"]
    assert [line for line in desk.log if "evaluating: 5 rows in" in line] == [
        "evaluating: 5 rows in 5.0 s",
        "evaluating: 5 rows in 15.0 s",
    ]


def test_on_a_terminal_steps_are_drawn_and_their_lines_are_logged(desk):
    desk = desk(is_live=True)
    with desk.terminal.progress("evaluating", total=100, unit="rows") as step:
        step.update(40)
        desk.wait(10)
        desk.terminal.say("in between")
    printed = desk.out.getvalue()
    assert "evaluating · 40/100 rows · 40 % · 15.0 s left" in printed
    assert "evaluating: 40/100 rows" not in printed
    assert printed.rstrip("\n").endswith("evaluating: 40 rows in 10.0 s")
    assert desk.log == [
        "evaluating ...",
        "evaluating: 40/100 rows, 40 %, 15.0 s left",
        "in between",
        "evaluating: 40 rows in 10.0 s",
    ]


def test_one_display_holds_training_and_a_step_inside(desk):
    desk = desk(is_live=True)
    desk.terminal.start_live(steps=100, done=0)
    with desk.terminal.progress("saving update 20"):
        desk.terminal.row(ROW)
    desk.terminal.stop_live()
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert desk.out.getvalue().count(hidden) == desk.out.getvalue().count(shown) == 1


@pytest.mark.parametrize("is_live", [False, True])
def test_quiet_leaves_warnings_and_the_log(desk, is_live):
    desk = desk(is_live=is_live, quiet=True)
    desk.terminal.say("a word")
    desk.terminal.start_live(steps=100, done=0)
    desk.terminal.row(ROW | {"eval/perplexity": 20.0})
    with desk.terminal.progress("evaluating"):
        desk.wait(30)
    desk.terminal.stop_live()
    desk.terminal.table("the end", [("perplexity", "1.5")])
    desk.terminal.warn("the weights do not move")
    assert desk.out.getvalue() == ""
    assert desk.err.getvalue() == "warning: the weights do not move\n"
    log = "\n".join(desk.log)
    for said in ("a word", "update 20/100", "evaluating: 20.0 s so far", "perplexity  1.5", "warning: the weights"):
        assert said in log


def test_a_warning_goes_to_stderr_even_while_bars_are_drawn_elsewhere(desk):
    desk = desk(is_live=True)
    with desk.terminal.progress("evaluating"):
        desk.terminal.warn("odd")
    assert desk.err.getvalue() == "warning: odd\n"
    assert "odd" not in desk.out.getvalue()


def test_a_warning_on_the_screen_with_the_bars_goes_through_them(desk):
    desk = desk(is_live=True)
    desk.terminal = Terminal(
        desk.terminal.console, warnings=Console(file=desk.err, force_terminal=True), clock=desk.clock
    )
    with desk.terminal.progress("evaluating"):
        desk.terminal.warn("odd")
    desk.terminal.close()
    assert desk.err.getvalue() == ""
    assert "warning: odd" in desk.out.getvalue()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("no data"), "error: no data"),
        (InterruptedRunError("saved", 15), "interrupted: saved"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_the_log_has_how_it_ended(desk, error, words):
    desk = desk()
    desk.terminal.log_to(RunLog(desk.folder / "log.txt"))
    with pytest.raises(type(error)), desk.terminal:
        raise error
    assert (desk.folder / "log.txt").read_text(encoding="utf-8").rstrip().endswith(f"  {words}")
    assert desk.err.getvalue() == ""


def test_the_log_has_the_traceback_of_our_own_bug_and_stderr_says_so(desk):
    desk = desk()
    desk.terminal.log_to(RunLog(desk.folder / "log.txt"))
    secret = "secret" + "-value"
    with pytest.raises(ZeroDivisionError), desk.terminal:
        raise ZeroDivisionError(len(secret))
    log = (desk.folder / "log.txt").read_text(encoding="utf-8")
    assert "Traceback" in log
    assert "ZeroDivisionError: 12" in log
    assert "secret-value" not in log
    assert all(STAMP.match(line) for line in log.splitlines())
    assert desk.err.getvalue().replace("\n", "") == f"the lines below are in {desk.folder / 'log.txt'} as well"


def test_a_disk_that_failed_does_not_hide_the_first_error(desk, monkeypatch):
    desk = desk()
    desk.terminal.log_to(RunLog(desk.folder / "log.txt"))

    def full(self, text, moment=None):
        raise StorageError("full")

    monkeypatch.setattr(RunLog, "write", full)
    with pytest.raises(InputError, match="first"), desk.terminal:
        raise InputError("first")


def test_the_answer_to_a_signal_is_drawn_where_there_is_a_display_and_logged(desk):
    lines = desk()
    with lines.terminal.progress("evaluating"):
        assert not lines.terminal.stopping("SIGINT: stopping")
        lines.wait(1)
    assert lines.lines == []
    assert "SIGINT: stopping" in lines.log
    drawn = desk(is_live=True)
    with drawn.terminal.progress("evaluating"):
        assert drawn.terminal.stopping("SIGINT: stopping")
        drawn.terminal.say("redrawn")
    assert "SIGINT: stopping" in drawn.out.getvalue()


def test_control_characters_of_others_never_get_through_r31(desk):
    desk = desk()
    desk.terminal.say("file \x1b[2J\rname")
    desk.terminal.table("a\x1bb", [("c\rd", "e\x1bf")])
    with desk.terminal.progress("\x1b[2J"):
        desk.wait(10)
    assert "\x1b" not in desk.out.getvalue()
    assert "\r" not in desk.out.getvalue()
    assert desk.lines[0] == "file \\x1b[2J\\rname"


def test_a_thread_looks_by_itself_and_ends_with_the_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr("blockllm_cli.tracking.terminal.TICK_SECONDS", 0.005)
    monkeypatch.setattr("blockllm_cli.tracking.progress.FIRST_LINE_SECONDS", 0.02)
    printed = io.StringIO()
    with Terminal(Console(file=printed, width=100)) as terminal, terminal.progress("waiting"):
        deadline = time.monotonic() + 30
        while "so far" not in printed.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert "blockllm-terminal" in {thread.name for thread in threading.enumerate()}
    assert "blockllm-terminal" not in {thread.name for thread in threading.enumerate()}
