"""A run that is cut and resumed is the unbroken run, to the bit (R07, R09, R12, R13)."""

import pytest

from support.tiny import equal_rows, equal_tensors

# A pairwise set: each pair of values of two different factors meets at least once.
CASES = [
    ("adamw", "fp32", "truncate", 0),
    ("adamw", "bf16", "pack", 2),
    ("adamw", "bf16_master", "truncate", 2),
    ("sgd:momentum=0.9", "fp32", "pack", 2),
    ("sgd:momentum=0.9", "bf16", "truncate", 0),
    ("sgd:momentum=0.9", "bf16_master", "pack", 0),
    ("adam", "bf16_papers", "pack", 0),
    ("frozen", "fp32", "truncate", 2),
    ("blockllm:patience=4,max_interval=7", "bf16_master", "pack", 2),
    ("blockllm:mask=entry,density=0.2,state=keep,patience=4,max_interval=7", "bf16", "truncate", 0),
    ("blockllm:variant=paper,max_interval=7,state=offload,patience=4", "bf16_papers", "pack", 0),
    ("blockllm:inactive=normalized,mask=row,density=0.3,patience=4,max_interval=7", "fp32", "pack", 0),
]


@pytest.mark.parametrize(("method", "precision", "layout", "workers"), CASES)
def test_60_updates_are_17_and_13_and_30(tiny, method, precision, layout, workers):
    sets = [
        "schedule.steps=60",
        "schedule.warmup=25",
        "evaluate.every=20",
        f"run.precision={precision}",
        f"data.layout={layout}",
        f"data.workers={workers}",
        "batch.micro_rows=4",
    ]
    if precision.startswith("bf16"):
        sets.append("run.rounding=stochastic")
    whole = tiny.run(*sets, method=method)
    if method.startswith("blockllm"):
        assert sum(event["kind"] == "selection" for event in whole.events) >= 5
    cut = tiny.run(*sets, method=method, stop_after=17)
    assert cut.summary["status"] == "stopped"
    assert cut.metrics[-1]["step"] == 17
    tiny.run(*sets, method=method, resume="latest", stop_after=30)
    resumed = tiny.run(*sets, method=method, resume=cut.folder)
    assert resumed.folder == cut.folder
    equal_rows(whole.metrics, resumed.metrics)
    equal_tensors(whole.tensors(), resumed.tensors())
    equal_tensors(whole.tensors("method"), resumed.tensors("method"))
    assert whole.rows == resumed.rows
    assert whole.events == resumed.events
    for key in ("train_rows_sha256", "perplexity", "unigram_perplexity", "memory", "tokens", "best_step"):
        assert whole.summary[key] == resumed.summary[key]


def test_the_same_recipe_twice_is_bit_equal_r30(tiny):
    one, other = tiny.run(), tiny.run()
    equal_rows(one.metrics, other.metrics)
    equal_tensors(one.tensors(), other.tensors())


def test_rows_are_the_same_for_any_workers_and_micro_rows(tiny):
    digests = {
        tiny.run(f"data.workers={workers}", f"batch.micro_rows={micro}").summary["train_rows_sha256"]
        for workers, micro in ((0, 8), (1, 2), (3, 1))
    }
    assert len(digests) == 1


def test_a_completed_run_is_left_alone(tiny):
    done = tiny.run()
    again = tiny.run(resume="latest")
    assert again.folder == done.folder
    assert "complete" in again.output
    assert len(done.metrics) == 21


def test_a_run_without_a_checkpoint_starts_over_in_its_folder(tiny):
    import shutil

    whole = tiny.run()
    cut = tiny.run(stop_after=5)
    shutil.rmtree(cut.folder / "checkpoints")
    resumed = tiny.run(resume=cut.folder)
    assert "no checkpoint yet" in resumed.output
    equal_rows(whole.metrics, resumed.metrics)
