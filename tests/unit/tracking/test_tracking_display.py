"""The redrawn lines, rendered at any width with and without colours and Unicode."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from blockllm_cli.tracking.display import Display
from blockllm_cli.tracking.progress import Step, Training

ROW = {
    "train/loss": 5.25,
    "eval/perplexity": 190.5,
    "throughput/tokens_per_second": 8123.4,
    "memory/rss_bytes": 2**30,
    "memory/weights_bytes": 2**20,
    "memory/optimizer_state_bytes": 2**21,
}


def rendered(width, *, notice="", encoding="utf-8", activities=None, **options):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(
        file=file, width=width, height=20, force_terminal=True, force_interactive=True, legacy_windows=False, **options
    )
    training = Training(steps=100, step=20, started=0.0, row=dict(ROW))
    training.first = 0
    step = Step("evaluating after update 20", 640, "rows", 30.0)
    step.update(120)
    shown = activities or (training, step)
    display = Display(console, lambda: shown, lambda: notice, lambda: 40.0)
    try:
        return [
            "".join(segment.text for segment in line)
            for line in console.render_lines(display, console.options, pad=False)
        ], [segment for segment in console.render(display, console.options) if segment.text.strip()]
    finally:
        display.stop()


def test_a_wide_terminal_shows_all_of_it():
    lines, _ = rendered(120, notice="SIGINT: stopping")
    assert lines == [
        "━━────────── 20/100 · loss 5.250 · perplexity 190.50 · 2 min 40 s left",
        "8,123 tokens/s · rss 1.00 GiB",
        "weights 1.00 MiB · state 2.00 MiB",
        "━━────────── evaluating after update 20 · 120/640 rows · 19 % · 43.3 s left",
        "SIGINT: stopping",
    ]


def test_a_narrow_terminal_shows_whole_figures_the_first_ones():
    lines, _ = rendered(42)
    assert lines == [
        "20/100 · loss 5.250 · perplexity 190.50",
        "8,123 tokens/s · rss 1.00 GiB",
        "weights 1.00 MiB · state 2.00 MiB",
        "evaluating after update … · 120/640 rows",
    ]


@pytest.mark.parametrize("width", [1, 2, 7, 20, 39, 40, 49, 50, 51, 79, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_line_is_wider_than_the_terminal_and_each_is_one_line(width, encoding):
    wide = Step("読み込み中\n\x1b[2J" * 10, 10, "行", 0.0)
    for activities in (None, (wide,)):
        lines, _ = rendered(width, notice="x" * 300, encoding=encoding, activities=activities)
        assert all(cell_len(line) <= max(1, width - 2) for line in lines)  # room for the ^C of the terminal's echo
        assert len(lines) == (5 if activities is None else 2)


def test_a_terminal_without_unicode_gets_a_bar_as_well():
    lines, _ = rendered(80, encoding="ascii")
    assert lines[0] == "##---------- 20/100, loss 5.250, perplexity 190.50, 2 min 40 s left"
    assert all(line.isascii() for line in lines)


def test_no_color_takes_the_colours_and_leaves_the_bar_readable(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, coloured = rendered(80, color_system="standard")
    assert any(segment.style and segment.style.color for segment in coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    lines, segments = rendered(80, color_system="standard")
    printed = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)
    assert printed.no_color
    assert lines[0].startswith("━━──────────")
    assert [segment.text for segment in segments] == [segment.text for segment in coloured]


def test_a_step_of_unknown_length_has_no_bar():
    lines, _ = rendered(80, activities=(Step("saving update 20", None, "", 38.0),))
    assert lines == ["saving update 20 · 2.0 s so far"]
