"""`blockllm inspect`: the map, the figures beside it, the causes; with and without colour; what cannot be shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blockllm_cli.app import main
from support.tiny import read_rows

Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
HEAD = "lm_head.weight"


def block(name: str, **more) -> dict:
    return {"name": name, "size": 100, "score": 1.0, "norm": 0.5, "age": 0, "visits": 1, **more}


def selection(step: int, cause: str, *taken: str) -> dict:
    return {
        "step": step,
        "kind": "selection",
        "number": 1,
        "cause": cause,
        "budget": 200,
        "candidates": 300,
        "kept": 100 * len(taken),
        "share": 1.0,
        "blocks": [block(name, kept=100, enters=step) for name in taken],
        "others": [block(name) for name in (HEAD, UP, Q) if name not in taken],
    }


@pytest.fixture(autouse=True)
def eighty_columns_of_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of 8 updates with selections at 1 and 5."""
    (tmp_path / "recipe.toml").write_text('[method]\nname = "blockllm"\nvariant = "paper"\n', encoding="utf-8")
    tensors = [{"name": name, "category": "weights"} for name in (Q, UP, HEAD)]
    (tmp_path / "plan.json").write_text(json.dumps({"tensors": tensors}), encoding="utf-8")
    write_events(tmp_path, selection(1, "first", UP, Q), selection(5, "patience", UP))
    summary = {"status": "completed", "steps": 8, "perplexity": 3.0}
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return tmp_path


def write_events(run: Path, *rows: dict) -> None:
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_the_map_has_a_row_for_every_block_in_the_models_order(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, run) == (
        f"{run}: blockllm (paper), updates 1 to 8\n"
        "candidates   300 entries in 3 blocks\n"
        "budget       200 entries (66.7% of the candidates), 100 kept since update 5 (50.0% of the budget)\n"
        "\n"
        "block      updates  visits      norm      at\n"
        "0 q_proj   ████····      1       0.5       5\n"
        "1 up_proj  ████████      2       0.5       5\n"
        "lm_head    ········      0       0.5       5\n"
        "selections ^   ^\n"
        "           1      8\n"
        "a column is an update; · not trained, █ trained in all of it; ^ a selection\n"
        "\n"
        "selections   2: first 1, patience 1\n"
        "  number    update  cause           blocks   new      kept  of budget\n"
        "       1         1  first                2     2       200     100.0%\n"
        "       2         5  patience             1     0       100      50.0%\n"
    )


def test_a_long_run_fits_eighty_columns_in_bins(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"status": "completed", "steps": 12_345, "perplexity": 3.0}
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    name = f"{UP}@100000:200000"
    write_events(run, selection(1, "first", name, Q), selection(6_001, "patience", HEAD), selection(6_100, "patience"))
    lines = shown(capsys, run).splitlines()
    header, first, _, cut, last = lines[4:9]
    assert {len(line) for line in (header, first, cut, last)} == {80}
    assert cut.startswith("1 up_proj@100000:2000… ")
    # 32 columns of 386 updates: all of 15, more than half of the 16th, none after.
    assert first.split()[2] == "█" * 15 + "▓" + "·" * 16
    assert last.split()[1] == "·" * 15 + "▒" + "·" * 16
    assert "a column is 386 updates" in lines[11]


def test_blocks_limits_the_rows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, run, "--blocks", 1)
    assert "1 up_proj" in text
    assert "0 q_proj" not in text
    assert "(2 more blocks, selected no more often, are not shown)" in text
    assert main(["inspect", str(run), "--blocks", "0"]) == 2


def test_many_selections_are_cut_to_the_newest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_events(run, *(selection(step, "max_interval", UP) for step in range(1, 31)))
    text = shown(capsys, run)
    assert "the newest 20 (--json has all):" in text
    assert "      11        11  max_interval         1     0" in text
    assert "      10        10  max_interval" not in text


def test_colour_is_on_a_terminal_only_and_the_characters_are_the_same(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shown(capsys, run)
    assert "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = shown(capsys, run)
    assert "\x1b[" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(capsys, run) == plain


def test_a_terminal_without_the_characters_gets_others(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    monkeypatch.setattr(Console, "encoding", "ascii")
    text = shown(capsys, run)
    assert text.isascii()
    assert "0 q_proj   ####...." in text


def test_json_has_everything(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(shown(capsys, run, "--json"))
    assert (told["run"], told["method"], told["updates"]) == (str(run), "blockllm (paper)", 8)
    assert (told["candidates"], told["budget"], told["kept"]) == (300, 200, 100)
    assert told["causes"] == {"first": 1, "patience": 1}
    assert [each["spans"] for each in told["blocks"]] == [[[1, 4]], [[1, 8]], []]


def test_what_there_is_nothing_to_show_of(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a folder; inspect takes the folder of a run" in refusal(capsys, tmp_path / "nowhere")
    write_events(run, {"step": 0, "kind": "validation_set"})
    assert "has no selection to show: blockllm (paper) made none in its 8 updates" in refusal(capsys, run)
    (run / "summary.json").unlink()
    assert "has no selection to show: it has done no update yet" in refusal(capsys, run)
    (run / "metrics.jsonl").write_text('{"step": 3}\n', encoding="utf-8")
    assert "made none in its 3 updates" in refusal(capsys, run)
    (run / "events.jsonl").unlink()
    assert "has no events.jsonl" in refusal(capsys, run)
    (run / "recipe.toml").write_text("[method]\n", encoding="utf-8")
    assert "recipe.toml does not name a method" in refusal(capsys, run)
    (run / "recipe.toml").unlink()
    assert "has no recipe.toml, so it is not the folder of a run" in refusal(capsys, run)


def test_damaged_events_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_events(run, selection(1, "first", UP) | {"budget": "many"})
    assert "events.jsonl, row 1: not a selection: budget: " in refusal(capsys, run)


def test_without_a_plan_blocks_are_in_the_order_of_the_first_selection(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "plan.json").write_text("{", encoding="utf-8")
    rows = [line.split()[:2] for line in shown(capsys, run).splitlines()[5:8]]
    assert rows[:2] == [["1", "up_proj"], ["0", "q_proj"]]


def test_a_real_run_is_shown_as_its_events_say(tiny, capsys: pytest.CaptureFixture[str]) -> None:
    made = tiny.run(method="blockllm:sparsity=0.6,max_interval=6,patience=4")
    told = json.loads(shown(capsys, made.folder, "--json"))
    events = [row for row in read_rows(made.folder / "events.jsonl") if row["kind"] == "selection"]
    assert [each["step"] for each in told["selections"]] == [row["step"] for row in events]
    newest = {each["name"]: each for each in [*events[-1]["blocks"], *events[-1]["others"]]}
    assert {each["name"]: each["visits"] for each in told["blocks"]} == {
        name: each["visits"] for name, each in newest.items()
    }
    planned = json.loads((made.folder / "plan.json").read_text(encoding="utf-8"))["tensors"]
    assert [each["name"] for each in told["blocks"]] == [
        tensor["name"] for tensor in planned if tensor["category"] == "weights" and tensor["name"] in newest
    ]
    assert max(map(len, shown(capsys, made.folder).splitlines()[4:20])) <= 80


def test_a_method_without_selections_is_told_so(tiny, capsys: pytest.CaptureFixture[str]) -> None:
    made = tiny.run("schedule.steps=1", "schedule.warmup=0")
    assert "adamw made none in its 1 updates; methods that choose blocks, such as blockllm, do" in refusal(
        capsys, made.folder
    )
