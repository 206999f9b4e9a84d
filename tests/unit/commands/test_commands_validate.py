"""`blockllm validate`."""

import json
import re
from pathlib import Path

import pytest

from blockllm_cli.app import main


def test_prints_every_value_with_its_origin_and_what_it_comes_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "quickstart", "--set", "schedule.steps=100", "--method", "sgd:momentum=0.5"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^rows +16 +\S*recipes/quickstart\.toml:\d+$", text, re.M)
    assert re.search(r"^steps +100 +--set schedule\.steps=100$", text, re.M)
    assert re.search(r"^momentum +0\.5 +--method sgd:momentum=0\.5$", text, re.M)
    assert re.search(r"^workers +1 +default$", text, re.M)
    assert re.search(r"^seed +\d+ +derived from run\.seed$", text, re.M)
    assert re.search(r"^clip +\S+ +from: sgd, ", text, re.M)
    assert "updates      100, of them 10 warm-up" in text
    assert "204,800 slots" in text


def test_counts_parameters_by_role(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "c4/60m", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    counts = report["parameters"]
    assert counts["total"] == 58_073_600  # 58.07M, as published for the size
    assert counts["attention"] + counts["mlp"] == 25_296_896
    assert sum(counts.values()) == 2 * counts["total"]
    assert (report["steps"], report["warmup_steps"], report["slots_per_update"]) == (10_000, 1_000, 131_072)
    assert report["passes_per_update"] == 2
    assert report["recipe"]["schedule"]["learning_rate"] == 0.001
    assert set(report["origins"]) == {f"{table}.{key}" for table, keys in report["recipe"].items() for key in keys}
    assert all(report["origins"].values())


def test_an_unread_tokenizer_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "quickstart", "--set", "tokenizer.source=file", "--set", "tokenizer.path=x"]) == 0
    text = capsys.readouterr().out
    assert "note: the vocabulary is known when the tokenizer has been read; parameters are counted with 32000" in text
    assert "kind" not in text


def test_a_wrong_recipe_ends_with_2_one_message_and_nothing_on_stdout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text('[model]\nsize = "60m"\n[batch]\nrow = 3\n', encoding="utf-8")
    assert main(["validate", "my.toml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "my.toml:4: batch.row = 3: there is no such key; did you mean rows?" in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.toml"]
