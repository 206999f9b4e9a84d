"""Ways in which a run could go wrong without a word, each found by trying to break it."""

import json

import pytest
from rich.console import Console

from blockllm_cli.errors import DivergedError, InputError, RecipeError
from support.tiny import equal_rows, equal_tensors

KEEPING = ("checkpoint.every=5", "checkpoint.keep=5")


def damage(folder, step):
    path = folder / "checkpoints" / f"step-{step:08d}" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-10:] = b"0123456789"
    path.write_bytes(content)


def test_falling_back_replaces_the_damaged_checkpoint(tiny):
    whole = tiny.run(*KEEPING)
    damage(whole.folder, 20)
    (whole.folder / "summary.json").unlink()
    again = tiny.run(*KEEPING, resume="latest-good")
    assert again.summary["status"] == "completed"
    fresh = tiny.run(*KEEPING)
    equal_tensors(again.tensors(), fresh.tensors())


def test_falling_back_with_one_to_keep_keeps_what_was_just_written(tiny):
    cut = tiny.run("checkpoint.every=5", "checkpoint.keep=2", stop_after=15)
    damage(cut.folder, 15)
    sets = ("checkpoint.every=1", "checkpoint.keep=1")
    tiny.run(*sets, resume="latest-good", stop_after=12)
    assert (cut.folder / "checkpoints" / "latest").read_text() == "step-00000012\n"
    resumed = tiny.run(*sets, resume="latest")
    equal_rows(resumed.metrics, tiny.run(*sets).metrics)


def test_what_lies_past_the_checkpoint_that_a_run_goes_on_from_is_set_aside_first(tiny):
    cut = tiny.run("checkpoint.every=5", "checkpoint.keep=5", stop_after=15)
    damage(cut.folder, 15)
    checkpoints = cut.folder / "checkpoints"
    for rest in (cut.folder / ".summary.json.4711.tmp", checkpoints / ".latest.4711.tmp"):
        rest.write_text("left by a killed process")
    tiny.run("checkpoint.every=5", "checkpoint.keep=5", resume="latest-good", stop_after=11)
    assert sorted(each.name for each in checkpoints.iterdir()) == [
        ".damaged-step-00000015",
        "latest",
        "step-00000005",
        "step-00000010",
        "step-00000011",
    ]
    assert not list(cut.folder.glob(".*.tmp"))


def test_another_validation_set_is_refused_before_anything_changes(tiny, tmp_path):
    lines = (tiny.corpus / "validation.jsonl").read_text().splitlines()
    path = tmp_path / "validation.jsonl"
    path.write_text("\n".join(lines))
    sets = (f"data.validation={path}",)
    cut = tiny.run(*sets, stop_after=10)
    before = {each: each.read_bytes() for each in cut.folder.rglob("*") if each.is_file()}
    path.write_text("\n".join(lines[10:]))
    with pytest.raises(InputError, match="validation rows are not what the run began with"):
        tiny.run(*sets, resume=cut.folder)
    assert before == {each: each.read_bytes() for each in cut.folder.rglob("*") if each.is_file()}


def test_other_training_text_of_equal_name_and_size_is_refused_and_the_summary_stays(tiny, tmp_path):
    path = tmp_path / "train.jsonl"
    text = (tiny.corpus / "train-0.jsonl").read_text()
    path.write_text(text)
    sets = (f"data.train={path}",)
    cut = tiny.run(*sets, stop_after=5)
    before = {each: each.read_bytes() for each in cut.folder.rglob("*") if each.is_file() and each.name != "log.txt"}
    path.write_text(text.replace("river", "ocean"))
    with pytest.raises(InputError, match="not those of the checkpoint"):
        tiny.run(*sets, resume=cut.folder)
    assert before == {
        each: each.read_bytes() for each in cut.folder.rglob("*") if each.is_file() and each.name != "log.txt"
    }


def test_stop_after_knows_where_the_run_is(tiny):
    cut = tiny.run(stop_after=10)
    before = (cut.folder / "metrics.jsonl").read_bytes()
    assert "there already" in tiny.run(resume=cut.folder, stop_after=10).output
    with pytest.raises(RecipeError, match="at update 10 already"):
        tiny.run(resume=cut.folder, stop_after=9)
    assert (cut.folder / "metrics.jsonl").read_bytes() == before


def test_a_stop_while_it_is_not_known_that_the_data_have_ended(tiny, monkeypatch):
    import os
    import signal

    from blockllm_cli.data.stream import RowStream
    from blockllm_cli.errors import InterruptedRunError, StopRequested

    sets = ("data.on_exhausted=stop", "schedule.steps=400", "evaluate.every=0", "tracking.log_every=1")
    whole = tiny.run(*sets)
    real = RowStream.take

    def striking(self, count):
        taken = real(self, count)
        if taken is None:
            os.kill(os.getpid(), signal.SIGTERM)
            raise StopRequested
        return taken

    with monkeypatch.context() as patch, pytest.raises(InterruptedRunError):
        patch.setattr(RowStream, "take", striking)
        tiny.run(*sets)
    cut = tiny.newest()
    assert cut.metrics[-1]["step"] == whole.metrics[-1]["step"]
    resumed = tiny.run(*sets, resume=cut.folder)
    equal_rows(whole.metrics, resumed.metrics)
    assert whole.events == resumed.events
    assert resumed.summary["perplexity"] == whole.summary["perplexity"]


def test_a_first_evaluation_that_is_not_finite_ends_as_diverged(tiny):
    sets = ("evaluate.at_start=false", "schedule.learning_rate=1e18", "schedule.warmup=0", "run.on_nonfinite=skip")
    with pytest.raises(DivergedError, match="evaluation after update 20 is not finite"):
        tiny.run(*sets)
    left = tiny.newest()
    assert left.summary["status"] == "diverged"
    assert left.summary["perplexity"] is None


def test_a_reader_that_goes_away_does_not_end_the_training(tiny):
    import subprocess

    process = subprocess.Popen(tiny.command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait() == 0, stderr
    process.stderr.close()
    assert tiny.newest().summary["status"] == "completed"
    assert "update 20/20" in (tiny.newest().folder / "log.txt").read_text()


def test_a_closed_stdout_is_no_bug(tiny):
    import subprocess

    command = " ".join(tiny.command("--set", "schedule.steps=2", "--set", "schedule.warmup=0")) + " >&-"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_seed_that_would_change_nothing_is_refused(tiny):
    run = tiny.run("schedule.steps=2", "schedule.warmup=0")
    tiny.recipe.write_text((run.folder / "recipe.toml").read_text())
    with pytest.raises(RecipeError, match=r"run\.seed.*has no effect.*model\.seed"):
        tiny.run("run.seed=7")


@pytest.mark.parametrize("override", ["model.rope_theta=5.0", "tokenizer.path=/nope", "method.name=sgd"])
def test_an_evaluation_does_not_change_the_model(tiny, override):
    from blockllm_cli.runner.finished import evaluate_run
    from blockllm_cli.tracking.terminal import Terminal

    run = tiny.run("schedule.steps=2", "schedule.warmup=0")
    with Terminal(Console(quiet=True)) as terminal, pytest.raises(RecipeError, match="belongs to the run"):
        evaluate_run(run.folder, step=None, overrides=[override], terminal=terminal)


def test_a_schedule_key_that_nothing_reads_is_refused(tiny):
    with pytest.raises(RecipeError, match=r"schedule\.min_ratio"):
        tiny.run("schedule.shape=constant", "schedule.min_ratio=0.5")


def test_another_machine_is_said_and_written_down(tiny):
    cut = tiny.run(stop_after=5)
    path = cut.folder / "environment.json"
    environment = json.loads(path.read_text())
    path.write_text(json.dumps({**environment, "threads": 7}))
    resumed = tiny.run(resume=cut.folder)
    assert "threads was 7, is 1" in resumed.output
    assert [each["threads"] for each in json.loads(path.read_text())["earlier"]] == [7]


@pytest.mark.parametrize("content", ["{}", "[]", "garbage", '{"status": "completed"}'])
def test_a_summary_that_says_nothing_does_not_stop_a_resume(tiny, content):
    cut = tiny.run(stop_after=5)
    (cut.folder / "summary.json").write_text(content)
    assert tiny.run(resume=cut.folder).summary["status"] == "completed"


MANIFESTS = [
    '{"format": 1}',
    '{"format": 1, "step": 5, "files": []}',
    '{"format": 1, "step": "x"}',
    '{"format": 1, "step": 5, "files": {}}',
    '{"format": 1, "step": 5, "files": ["weights.safetensors", "method.safetensors", "state.json"]}',
    "[]",
    "",
]


@pytest.mark.parametrize("content", MANIFESTS)
def test_a_manifest_of_any_other_shape_is_damage(tiny, content):
    cut = tiny.run("checkpoint.every=3", stop_after=5)
    (cut.folder / "checkpoints" / "step-00000005" / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="latest-good"):
        tiny.run("checkpoint.every=3", resume=cut.folder)
    assert tiny.run("checkpoint.every=3", resume="latest-good").summary["status"] == "completed"


@pytest.mark.parametrize("line", ["[1]", '{"a": 1}'])
def test_rows_of_any_other_shape_are_damage(tiny, line):
    cut = tiny.run(stop_after=5)
    path = cut.folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(InputError, match="row 3"):
        tiny.run(resume=cut.folder)
