import errno
import json

import pytest

from blockllm_cli import durable
from blockllm_cli.errors import StorageError


def test_a_failed_write_leaves_the_old_file_and_nothing_beside(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    durable.write_text(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*summary\.json: No space left .* free\); free some space"):
        durable.write_text(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]


def test_a_folder_that_is_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(StorageError, match="runs"):
        durable.write_text(tmp_path / "runs" / "x.json", "{}")


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        durable.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_text_is_utf8_whatever_the_locale(tmp_path):
    durable.write_json(tmp_path / "x.json", {"name": "Übung"})
    assert json.loads((tmp_path / "x.json").read_bytes().decode("utf-8")) == {"name": "Übung"}


def test_rests_of_killed_writers_are_swept_and_nothing_else(tmp_path):
    (tmp_path / ".latest.4711.tmp").write_text("half")
    folder = tmp_path / ".step-00000001.4711.tmp"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"half")
    kept = [tmp_path / "latest", tmp_path / ".lock", tmp_path / "notes.tmp"]
    for path in kept:
        path.write_text("mine")
    durable.sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
