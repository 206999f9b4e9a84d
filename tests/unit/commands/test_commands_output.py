"""Which stream carries what: --quiet and --json of each command that has them."""

import json

import pytest

from blockllm_cli import app
from blockllm_cli.commands.output import print_json
from blockllm_cli.training.trainer import Trainer

SHORT = ("--set", "schedule.steps=4", "--set", "schedule.warmup=0", "--set", "evaluate.every=2")


@pytest.fixture
def command(tiny, capsys):
    """Calls the command in this process; status, stdout, stderr."""

    def call(*arguments):
        status = app.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_pretrain_narrates_on_stdout_and_ends_with_the_folder(command, tiny):
    status, out, err = command("pretrain", tiny.recipe, *SHORT)
    assert (status, err) == (0, "")
    assert "update 4/4" in out
    assert out.splitlines()[-1] == str(tiny.newest().folder)


def test_pretrain_quiet_prints_the_folder_and_logs_the_rest(command, tiny):
    status, out, err = command("pretrain", tiny.recipe, *SHORT, "--quiet")
    assert (status, out, err) == (0, f"{tiny.newest().folder}\n", "")
    log = (tiny.newest().folder / "log.txt").read_text()
    assert "update 4/4" in log
    assert "validation perplexity" in log


def test_pretrain_json_is_the_summary_and_the_folder_alone(command, tiny):
    status, out, err = command("pretrain", tiny.recipe, *SHORT, "--json")
    assert status == 0
    assert json.loads(out) == {"run": str(tiny.newest().folder), **tiny.newest().summary}
    assert "update 4/4" in err
    status, out, err = command("pretrain", "--resume", tiny.newest().folder, "--json", "-q")
    assert (status, err) == (0, "")
    assert json.loads(out)["status"] == "completed"


@pytest.mark.parametrize("flags", [(), ("--json",), ("--quiet",)])
def test_a_failure_leaves_stdout_without_a_result(command, tiny, flags):
    status, out, err = command("pretrain", tiny.recipe, "--set", "data.train=nowhere/*.jsonl", *flags)
    assert status == 3
    assert out == ""
    assert err.startswith("error: data.train")


def test_evaluate(command, tiny):
    run = tiny.run("schedule.steps=4", "schedule.warmup=0")
    status, out, err = command("evaluate", run.folder, "--quiet")
    assert (status, err) == (0, "")
    perplexity = run.summary["perplexity"]
    assert out == f"perplexity {perplexity:.4f}  ({run.folder}, update 4, 605 target tokens)\n"
    status, out, err = command("evaluate", run.folder, "--json")
    assert status == 0
    assert json.loads(out)["perplexity"] == perplexity
    assert "validation: 19 rows" in err
    status, out, err = command("evaluate", run.folder, "--json", "--quiet")
    assert (json.loads(out)["step"], err) == (4, "")
    status, out, err = command("evaluate", run.folder)
    assert f"{perplexity:.4f}" in out
    assert err == ""


def test_recipes_show_is_json_too(command):
    status, out, _ = command("recipes", "show", "quickstart", "--json")
    short = json.loads(out)
    status, out, _ = command("recipes", "show", "quickstart", "--json", "--resolved")
    full = json.loads(out)
    assert status == 0
    assert short["name"] == full["name"] == "quickstart"
    assert short["recipe"]["schedule"]["steps"] == full["recipe"]["schedule"]["steps"]
    assert short["recipe"]["data"].keys() < full["recipe"]["data"].keys()


def test_a_bug_is_in_the_log_with_its_traceback(command, tiny, monkeypatch):
    def fail(self, step, taken, started):
        raise ZeroDivisionError("odd")

    monkeypatch.setattr(Trainer, "_update", fail)
    status, _, err = command("pretrain", tiny.recipe, *SHORT)
    assert status == 1
    run = tiny.newest()
    log = (run.folder / "log.txt").read_text()
    assert "Traceback (most recent call last):" in log
    assert "ZeroDivisionError: odd" in log
    assert err.startswith(f"the lines below are in {run.folder / 'log.txt'} as well\nTraceback")
    assert err.endswith("this is a bug in blockllm: please report it with the lines above\n")


def test_an_expected_failure_is_in_the_log(command, tiny):
    status, _, err = command("pretrain", tiny.recipe, *SHORT, "--set", "schedule.learning_rate=1e30")
    assert status == 5
    log = (tiny.newest().folder / "log.txt").read_text()
    assert f"  {err.splitlines()[0]}\n" in log
    assert "validation: 19 rows" in log  # said before there was a folder
    assert "Traceback" not in log


def test_json_has_null_for_what_is_not_finite(capsys):
    print_json({"a": float("inf"), "b": [float("nan"), 1.5, "x"], "c": ({"d": -float("inf")},)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5, "x"], "c": [{"d": None}]}
