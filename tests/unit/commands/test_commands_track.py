"""`blockllm track`: a run reaches W&B afterwards, once; or one clear message says what is missing."""

import json
import shutil

import pytest

from blockllm_cli.app import main
from support.tiny import Result, TinyRuns
from support.wandb_file import offline_runs
from support.wandb_server import KEY, WandbServer
from support.wandb_stub import Stub


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_corpus, tiny_tokenizer) -> Result:
    runs = TinyRuns(tmp_path_factory.mktemp("finished"), tiny_corpus, tiny_tokenizer)
    return runs.run("schedule.steps=6", "schedule.warmup=0", "evaluate.every=3")


@pytest.fixture
def run(finished, tmp_path, monkeypatch) -> Result:
    """A copy of an untracked run, on a machine that has neither key nor settings of W&B."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return Result(shutil.copytree(finished.folder, tmp_path / "copied"), "")


@pytest.fixture
def server(run, monkeypatch):
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


def test_a_finished_run_is_sent_and_sending_again_sends_nothing_more(run, server, capsys):
    assert main(["track", str(run.folder), "--set", "tracking.project=thesis", "--json"]) == 0
    (identity,) = server.runs
    stored = server.runs[identity]
    assert stored.steps == [0, 1, 2, 3, 4, 5, 6]
    assert (stored.exit_code, stored.fields["project"]) == (0, "thesis")
    said = json.loads(capsys.readouterr().out)
    assert said["run"] == str(run.folder)
    assert (said["id"], said["mode"], said["rows"]) == (identity, "online", 7)
    assert said["url"] == f"{server.url}/me/thesis/runs/{identity}"
    assert main(["track", str(run.folder), "--set", "tracking.project=thesis", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 0
    assert stored.steps == [0, 1, 2, 3, 4, 5, 6]


def test_offline_writes_files_without_key_or_network(run, capsys):
    assert main(["track", str(run.folder), "--offline"]) == 0
    (found,) = offline_runs(run.folder)
    assert found.rows == run.metrics
    assert f"7 rows: {found.path.parent} (send it with: wandb sync" in "".join(capsys.readouterr().out.splitlines())


def test_a_run_that_was_killed_is_sent_as_failed(run):
    (run.folder / "summary.json").unlink()
    assert main(["track", str(run.folder), "--offline"]) == 0
    (found,) = offline_runs(run.folder)
    assert found.exit_code == 1


def test_without_a_key_it_refuses_and_names_the_way_out(run, capsys):
    assert main(["track", str(run.folder)]) == 3
    message = capsys.readouterr().err
    assert "no API key" in message
    assert "--offline" in message
    assert not (run.folder / "wandb").exists()


def test_without_a_server_it_refuses(run, server, capsys):
    server.status = 500
    assert main(["track", str(run.folder)]) == 3
    assert f"cannot reach {server.url}" in capsys.readouterr().err
    assert offline_runs(run.folder) == []


@pytest.mark.parametrize(
    ("mode", "arguments", "word"),
    [("disabled", [], "disabled"), ("disabled", ["--offline"], "disabled"), ("offline", [], "set to offline")],
)
def test_the_environment_may_forbid_it(run, monkeypatch, capsys, mode, arguments, word):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert main(["track", str(run.folder), *arguments]) == 3
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("behaviour", ["raise:init", "raise:log", "raise:finish", "die:log", "hang:finish"])
def test_what_was_not_sent_is_an_error_here(run, tmp_path, monkeypatch, capsys, behaviour):
    Stub(tmp_path, monkeypatch, behaviour)
    seconds = "2" if behaviour.startswith("hang") else "60"
    assert main(["track", str(run.folder), "--offline", "--timeout", seconds]) == 3
    message = capsys.readouterr().err
    assert message.startswith("error: W&B: ")
    assert "can be sent again" in message


def test_places_and_keys_that_do_not_fit_are_refused(run, tmp_path, capsys):
    assert main(["track", str(tmp_path / "nowhere")]) == 3
    assert "is not a folder; track takes the folder of a run" in capsys.readouterr().err
    assert main(["track", str(run.folder), "--set", "schedule.steps=3"]) == 2
    assert "only tracking.*" in capsys.readouterr().err
    (run.folder / "metrics.jsonl").unlink()
    assert main(["track", str(run.folder), "--offline"]) == 3
    assert "nothing to send" in capsys.readouterr().err
