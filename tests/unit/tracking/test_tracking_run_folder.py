import json
import subprocess
import sys

import pytest

from blockllm_cli.errors import InputError, StorageError
from blockllm_cli.tracking.run_folder import (
    METRICS,
    JsonLines,
    RunFolder,
    cut_json_lines,
    read_json_lines,
    safe_name,
)


def make(path, name="a", recipe=True):
    folder = RunFolder.create(path, name)
    if recipe:
        (folder.path / "recipe.toml").write_text("")
    return folder


@pytest.mark.parametrize(
    ("name", "safe"), [("a:b/c?", "a-b-c"), ("..", "run"), ("Übung 3", "bung-3"), ("plain_1.2", "plain_1.2")]
)
def test_any_name_becomes_a_folder_r32(tmp_path, name, safe):
    assert safe_name(name) == safe
    assert make(tmp_path / "a b ü", name).path.is_dir()


def test_rows_are_cut_and_a_half_written_line_is_dropped(tmp_path):
    path = tmp_path / METRICS
    rows = JsonLines(path)
    for step in range(5):
        rows.append({"step": step, "train/loss": 1.0 / (step + 1)})
    rows.close()
    with path.open("a") as file:
        file.write('{"step": 5, "train/lo')
    assert [row["step"] for row in read_json_lines(path)] == [0, 1, 2, 3, 4]
    cut_json_lines(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_damage_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / METRICS
    path.write_text('{"step": 0}\nnonsense\n{"step": 1}\n{"step": 2}\n')
    with pytest.raises(InputError, match="line 2"):
        read_json_lines(path)


def test_a_pending_row_is_cut_too(tmp_path):
    folder = make(tmp_path)
    for name in ("metrics.jsonl", "events.jsonl"):
        (folder.path / name).write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    folder.cut(2, row_pending=True)
    assert [row["step"] for row in read_json_lines(folder.path / "metrics.jsonl")] == [1]
    assert [row["step"] for row in read_json_lines(folder.path / "events.jsonl")] == [1, 2]


def test_another_process_is_kept_out(tmp_path):
    folder = make(tmp_path)
    program = (
        "import sys; from pathlib import Path; from blockllm_cli.tracking.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked():\n    print('in')\n"
    )
    command = [sys.executable, "-c", program, str(folder.path)]
    with folder.locked():
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert "in use by another process" in done.stderr
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "in\n"


def test_latest_is_the_newest_with_a_recipe(tmp_path):
    first = make(tmp_path)
    first.path.rename(first.path.with_name("20000101-000000-aaaa"))
    second = make(tmp_path)
    make(tmp_path, recipe=False).path.rename(tmp_path / "a" / "99990101-000000-aaaa")
    assert RunFolder.latest(tmp_path, "a").path == second.path
    with pytest.raises(InputError, match="no run to resume"):
        RunFolder.latest(tmp_path, "b")


def test_what_is_no_run_folder_is_said_to_be_none(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        RunFolder.existing(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no recipe\.toml"):
        RunFolder.existing(tmp_path)


def test_a_read_only_place_is_a_storage_error(tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot make"):
        RunFolder.create(tmp_path / "runs", "a")
