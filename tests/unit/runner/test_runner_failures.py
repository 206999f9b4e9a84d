"""What ends a run before its time, and what is left on disk then (R14, R15, R16, R28, exit codes)."""

import json

import pytest
import torch

from blockllm_cli.errors import DivergedError, InputError, RecipeError, StorageError
from support.tiny import equal_rows


def test_a_run_that_diverges_keeps_healthy_checkpoints_r15(tiny):
    with pytest.raises(DivergedError, match=r"update \d+: loss .*learning rate .* too high") as caught:
        tiny.run("schedule.learning_rate=1e20", "schedule.warmup=0", "checkpoint.every=1")
    assert caught.value.exit_code == 5
    left = tiny.newest()
    assert left.summary["status"] == "diverged"
    assert left.summary["exit_code"] == 5
    assert all(torch.isfinite(tensor).all() for tensor in left.tensors().values())


def test_one_bad_update_is_skipped_if_the_recipe_says_so_r15(tiny, monkeypatch):
    from blockllm_cli.training import trainer

    calls = iter(range(1000))
    real = trainer.kept_norm

    def third_is_nan(tensors):
        norm = real(tensors)
        return norm * float("nan") if next(calls) == 2 else norm

    monkeypatch.setattr(trainer, "kept_norm", third_is_nan)
    result = tiny.run("run.on_nonfinite=skip")
    assert [event["step"] for event in result.events if event["kind"] == "skip"] == [3]
    row = next(row for row in result.metrics if row["step"] == 3)
    assert row["train/skipped"] is True
    assert row["train/gradient_norm"] is None
    assert result.summary["skipped_updates"] == 1
    assert result.summary["status"] == "completed"


def test_a_missing_tensor_is_named_r14(tiny):
    from safetensors.torch import load_file, save_file

    from blockllm_cli.durable import file_sha256

    cut = tiny.run(stop_after=4)
    folder = cut.folder / "checkpoints" / "step-00000004"
    path = folder / "weights.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"model\.norm\.weight") as caught:
        tiny.run(resume=cut.folder)
    assert caught.value.exit_code == 3


def test_checkpoint_names_are_hugging_faces_with_activation_checkpointing_too_r14(tiny):
    plain, recomputed = tiny.run(), tiny.run("model.checkpoint_activations=true")
    assert plain.tensors().keys() == recomputed.tensors().keys()
    assert "model.layers.1.self_attn.q_proj.weight" in plain.tensors()
    equal_rows(plain.metrics, recomputed.metrics)


def test_bf16_says_how_much_rounding_swallowed_r16(tiny):
    sets = ["run.precision=bf16", "schedule.learning_rate=1e-6", "schedule.warmup=0", "tracking.log_every=5"]
    nearest = tiny.run(*sets)
    assert nearest.column("train/unchanged_fraction")[0] > 0.5
    assert "rounding to bf16 kept" in nearest.output
    assert "bf16_master" in nearest.output
    assert "train/unchanged_fraction" not in tiny.run().metrics[-1]


def test_a_vocabulary_that_does_not_fit_the_model_r28(tiny):
    with pytest.raises(RecipeError, match=r"300.*256|256.*300"):
        tiny.run("model.vocab_size=256")
    assert not (tiny.folder / "runs").exists()
    tiny.run("model.vocab_size=320", "schedule.steps=1", "schedule.warmup=0")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("schedule.steps=21", ("20", "21")),
        ("data.seed=77", ("77",)),
        ("method.betas=[0.8, 0.9]", ("0.8", "0.999")),
        ("batch.rows=4", ("8", "4")),
    ],
)
def test_a_resume_refuses_another_run_with_both_values(tiny, key, values):
    cut = tiny.run(stop_after=4)
    before = sorted(path.name for path in cut.folder.rglob("*"))
    with pytest.raises(RecipeError) as caught:
        tiny.run(key, resume=cut.folder)
    assert key.split("=")[0] in str(caught.value)
    assert all(value in str(caught.value) for value in values)
    assert sorted(path.name for path in cut.folder.rglob("*")) == before


def test_what_may_differ_at_a_resume_may(tiny):
    cut = tiny.run(stop_after=4)
    resumed = tiny.run(
        "tracking.log_every=5", "checkpoint.every=7", "data.workers=1", "batch.micro_rows=2", resume=cut.folder
    )
    assert "batch.micro_rows was" in resumed.output
    assert "not bit-equal" in resumed.output
    assert resumed.summary["status"] == "completed"
    assert resumed.summary["train_rows_sha256"] == tiny.run().summary["train_rows_sha256"]


def test_the_newest_checkpoint_damaged(tiny):
    cut = tiny.run("checkpoint.every=3", stop_after=8)
    newest = cut.folder / "checkpoints" / "step-00000008" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(InputError, match="latest-good"):
        tiny.run("checkpoint.every=3", resume="latest")
    resumed = tiny.run("checkpoint.every=3", resume="latest-good")
    assert "resuming at update 6" in resumed.output
    equal_rows(resumed.metrics, tiny.run("checkpoint.every=3").metrics)


def test_a_run_in_use_is_locked(tiny):
    from blockllm_cli.tracking.run_folder import RunFolder

    cut = tiny.run(stop_after=4)
    # Another open of the same folder holds the lock, as another process would.
    with RunFolder(cut.folder).locked(), pytest.raises(StorageError, match="in use"):
        tiny.run(resume=cut.folder)


@pytest.mark.parametrize("stop_after", [0, 21, -3])
def test_stop_after_must_be_an_update_of_the_run(tiny, stop_after):
    with pytest.raises(RecipeError, match="updates 1 to 20"):
        tiny.run(stop_after=stop_after)


def test_a_device_that_is_not_there(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"run\.device.*cuda:0.*it has cpu"):
        tiny.run("run.device=cuda:0")
