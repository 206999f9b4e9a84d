"""What reaches W&B, read back: from the file of an offline run, and from a small server that the client talks to."""

import json
import shutil

import pytest

from blockllm_cli.app import main
from blockllm_cli.errors import DivergedError
from blockllm_cli.tracking import wandb_process
from support.tiny import Result
from support.wandb_file import offline_runs
from support.wandb_server import KEY, WandbServer

SETS = ("schedule.steps=6", "schedule.warmup=0", "evaluate.every=3", "checkpoint.every=2")
BLOCKLLM = "blockllm:sparsity=0.5,max_interval=2,patience=2"


@pytest.fixture
def tracked(tiny, monkeypatch):
    """Runs with W&B offline, unless a test says otherwise."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tiny.folder))
    monkeypatch.setattr(wandb_process, "FINISH_SECONDS", 60.0)  # on a busy machine W&B takes longer to come up
    return tiny


@pytest.fixture
def server(monkeypatch):
    """A W&B for which this process has a key."""
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


def one_line(result: Result) -> str:
    return "".join(result.output.splitlines())


def crash_after(result: Result, step: int) -> None:
    """Leave the folder as a kill would: the last checkpoint is that of `step`, rows go on to the end."""
    checkpoints = result.folder / "checkpoints"
    for folder in checkpoints.glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    (checkpoints / "latest").write_text(f"step-{step:08d}\n")
    (result.folder / "summary.json").unlink()


def test_an_offline_run_agrees_with_the_rows_on_disk(tracked):
    result = tracked.run(*SETS, 'tracking.tags=["a b", "c"]', "tracking.project=thesis", "tracking.group=g")
    assert one_line(result).count("W&B") == 1
    assert "W&B: offline, since there is no API key" in one_line(result)
    (found,) = offline_runs(result.folder)
    assert found.rows == result.metrics
    assert found.steps == [row["step"] for row in result.metrics]
    assert found.exit_code == 0
    assert (found.run.run_id, found.run.project, found.run.run_group) == (result.folder.name, "thesis", "g")
    assert list(found.run.tags) == ["a b", "c"]
    import tomllib

    assert found.config == tomllib.loads((result.folder / "recipe.toml").read_text())


def test_tokens_are_the_axis_of_everything_and_the_best_perplexity_is_kept(tracked):
    result = tracked.run(*SETS)
    (found,) = offline_runs(result.folder)
    assert found.metrics["*"].step_metric == "train/tokens"
    assert found.metrics["eval/perplexity"].step_metric == "train/tokens"
    assert found.metrics["eval/perplexity"].summary.min
    assert found.summary["perplexity"] == result.summary["perplexity"]
    assert found.summary["status"] == "completed"


def test_selections_come_as_table_and_picture(tracked):
    result = tracked.run(*SETS, method=BLOCKLLM)
    (found,) = offline_runs(result.folder)
    assert found.rows[:-1] == result.metrics
    assert found.rows[-1]["selections/blocks._type"] == "table-file"
    files = found.path.parent / "files"
    table = json.loads((files / found.rows[-1]["selections/blocks.path"]).read_text())
    assert table["columns"][0] == "block"
    assert "model.layers.1.mlp.up_proj.weight" in [row[0] for row in table["data"]]
    assert "<svg" in (files / found.rows[-1]["selections/map.path"]).read_text()


def test_a_run_that_may_go_on_has_no_picture_yet(tracked):
    result = tracked.run(*SETS, method=BLOCKLLM, stop_after=3)
    (found,) = offline_runs(result.folder)
    assert found.rows == result.metrics


def test_a_run_that_diverged_is_marked_failed_and_alerts(tracked):
    with pytest.raises(DivergedError):
        tracked.run(*SETS, "schedule.learning_rate=1e30")
    (found,) = offline_runs(tracked.newest().folder)
    assert found.exit_code == 5
    ((title, text),) = found.alerts
    assert title.endswith("diverged")
    assert text == tracked.newest().summary["message"]


def test_after_a_crash_the_offline_run_is_one_with_each_step_once(tracked):
    cut = tracked.run(*SETS)
    crash_after(cut, 2)
    resumed = tracked.run(*SETS, resume=cut.folder)
    (found,) = offline_runs(resumed.folder)
    assert found.rows == resumed.metrics
    assert found.steps == [0, 1, 2, 3, 4, 5, 6]


def test_a_run_goes_to_the_server_and_a_resume_continues_it(tracked, server):
    first = tracked.run(*SETS, "tracking.tags=a", stop_after=3)
    (identity,) = server.runs
    assert identity == first.folder.name
    assert f"W&B: {server.url}/me/blockllm/runs/{identity}" in one_line(first)
    stored = server.runs[identity]
    assert (stored.steps, stored.exit_code) == ([0, 1, 2, 3], 0)
    resumed = tracked.run(*SETS, "tracking.tags=a", resume=first.folder)
    assert list(server.runs) == [identity]
    assert stored.steps == [0, 1, 2, 3, 4, 5, 6]
    assert [
        {key: row[key] for key in of_disk} for row, of_disk in zip(stored.history, resumed.metrics, strict=True)
    ] == (resumed.metrics)
    assert stored.fields["tags"] == ["a"]
    assert stored.summary["status"] == "completed"
    assert min(resumed.column("eval/perplexity")) == stored.summary["eval/perplexity"]["min"]


@pytest.mark.parametrize("received", [7, 4, 0])
def test_after_a_crash_no_step_reaches_the_server_twice_and_none_is_missing(tracked, server, received):
    cut = tracked.run(*SETS)
    (stored,) = server.runs.values()
    assert stored.steps == [0, 1, 2, 3, 4, 5, 6]
    stored.forget(received)
    crash_after(cut, 2)
    tracked.run(*SETS, resume=cut.folder)
    assert stored.steps == [0, 1, 2, 3, 4, 5, 6]


def test_a_run_that_was_offline_is_caught_up_with_when_the_server_is_there(tracked, server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delenv("WANDB_API_KEY")
        first = tracked.run(*SETS, stop_after=3)
        assert len(offline_runs(first.folder)) == 1
    tracked.run(*SETS, resume=first.folder)
    (stored,) = server.runs.values()
    assert stored.steps == [0, 1, 2, 3, 4, 5, 6]
    assert offline_runs(first.folder) == []


def test_a_server_out_of_reach_means_offline_with_one_line(tracked, server):
    server.status = 503
    result = tracked.run(*SETS)
    assert one_line(result).count("W&B") == 1
    assert "W&B: offline, since" in one_line(result)
    assert "503" in one_line(result)
    (found,) = offline_runs(result.folder)
    assert found.rows == result.metrics


def test_a_network_that_swallows_everything_costs_the_run_the_deadline_and_no_row_r33(tracked, server, monkeypatch):
    monkeypatch.setattr(wandb_process, "FINISH_SECONDS", 3.0)
    server.unanswered = "/file_stream"
    result = tracked.run(*SETS)
    assert result.summary["status"] == "completed"
    assert "W&B: not all was sent within 3 s; `blockllm track" in one_line(result)
    (stored,) = server.runs.values()
    assert stored.steps == []
    server.unanswered = None
    assert main(["track", str(result.folder)]) == 0
    assert stored.steps == [0, 1, 2, 3, 4, 5, 6]
    assert stored.exit_code == 0


def test_table_and_picture_reach_the_server_once_and_no_row_is_in_their_place(tracked, server):
    """The run is stopped where they would have stood had they been sent too early."""
    first = tracked.run(*SETS, method=BLOCKLLM, stop_after=3)
    (stored,) = server.runs.values()
    assert stored.steps == [0, 1, 2, 3]
    tracked.run(*SETS, method=BLOCKLLM, resume=first.folder)
    assert stored.steps == [0, 1, 2, 3, 4, 5, 6]
    assert (stored.exit_code, stored.summary["status"]) == (0, "completed")
    assert [row["_step"] for row in stored.history] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert {"selections/blocks", "selections/map"} <= stored.history[-1].keys()
    assert len(server.artifacts) == 1
    assert main(["track", str(first.folder)]) == 0
    assert len(stored.history) == 8
    assert len(server.artifacts) == 1


def test_a_failed_run_is_failed_on_the_server_as_well(tracked, server):
    with pytest.raises(DivergedError):
        tracked.run(*SETS, "schedule.learning_rate=1e30")
    (stored,) = server.runs.values()
    assert stored.exit_code == 5
    assert len(stored.alerts) == 1
