"""What the figures of a run mean: loss, tokens, perplexity (R01, R02, R04, R05, R13, R30)."""

import json
import math
import random

import numpy as np
import pytest
import torch

from support.tiny import equal_rows


@pytest.fixture
def uneven(tmp_path):
    """Documents of 1 word and of 30, mixed, so that rows have from few to many targets."""
    draw = random.Random(3)
    words = ["river", "stone", "garden", "letter", "window", "doctor", "market", "winter", "engine", "valley"]
    lines = [
        json.dumps({"text": " ".join(draw.choice(words) for _ in range(draw.choice([1, 1, 30])))}) for _ in range(200)
    ]
    (tmp_path / "uneven.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "uneven.jsonl"


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_micro_batches_are_an_implementation_detail_r01(tiny, uneven, clip):
    """Loss and norm of each update and the final weights do not depend on how 8 uneven rows are cut."""
    sets = [f"data.train={uneven}", "data.layout=truncate", f"schedule.clip={clip}"]
    runs = [tiny.run(*sets, f"batch.micro_rows={micro}") for micro in (8, 4, 1)]
    for other in runs[1:]:
        for key in ("train/loss", "train/gradient_norm"):
            np.testing.assert_allclose(other.column(key), runs[0].column(key), rtol=1e-5)
        for name, tensor in runs[0].tensors().items():
            torch.testing.assert_close(other.tensors()[name], tensor, rtol=0, atol=1e-5)
    assert min(runs[0].column("train/gradient_norm")) > 0.1, "clipping at 0.1 must have acted"


def test_tokens_are_targets_and_slots_are_positions_r02(tiny, uneven):
    """Counted again by a script of its own: pieces of each document plus EOS, less one, at most 32."""
    import sentencepiece

    sets = [f"data.train={uneven}", "data.layout=truncate", "schedule.steps=10", "data.on_exhausted=stop"]
    result = tiny.run(*sets)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tiny.tokenizer))
    texts = [json.loads(line)["text"] for line in uneven.read_text().splitlines()]
    seen = [label for row in result.rows for labels in row["documents"] for label in labels]
    assert len(seen) == 80
    expected = sum(min(len(model.encode(texts[int(label.split(":")[1]) - 1])) + 1, 32) - 1 for label in seen)
    assert result.summary["tokens"] == expected
    assert result.metrics[-1]["train/slots"] == 10 * 8 * 32
    cut = tiny.run(*sets, stop_after=4)
    assert tiny.run(*sets, resume=cut.folder).summary["tokens"] == expected


@pytest.mark.parametrize("layout", ["truncate", "pack"])
def test_perplexity_does_not_depend_on_the_batch_r04(tiny, layout):
    found = [
        tiny.run(f"evaluate.rows={rows}", f"data.layout={layout}", "schedule.steps=3", "schedule.warmup=0")
        for rows in (1, 4, 7, 32)
    ]
    values = [run.summary["perplexity"] for run in found]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)
    assert len({run.summary["validation_sha256"] for run in found}) == 1
    assert len({run.summary["train_loss"] for run in found}) == 1, "evaluation never moves training"


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_with_a_head_of_zeros_perplexity_is_the_vocabulary_r05(tiny, rows):
    """initializer_range tiny enough makes every logit equal: ln V per target, and ln V x N / (N + 1) in legacy form."""
    result = tiny.run(
        "model.initializer_range=1e-30",
        "schedule.learning_rate=1e-30",
        "schedule.steps=1",
        "schedule.warmup=0",
        f"evaluate.rows={rows}",
    )
    summary = result.summary
    assert summary["perplexity"] == pytest.approx(320, rel=1e-6)
    total = validation_rows(result)
    count = math.ceil(total / rows)
    assert summary["perplexity_legacy"] == pytest.approx(math.exp(math.log(320) * count / (count + 1)), rel=1e-6)


def validation_rows(result) -> int:
    line = next(line for line in result.output.splitlines() if line.startswith("validation:"))
    return int(line.split()[1])


@pytest.mark.parametrize(
    ("every", "evaluated", "saved"), [(5, [0, 5, 7], [5, 7]), (100, [0, 7], [7]), (7, [0, 7], [7])]
)
def test_the_last_step_counts_once_r13(tiny, every, evaluated, saved):
    result = tiny.run("schedule.steps=7", f"evaluate.every={every}", f"checkpoint.every={every}")
    assert [row["step"] for row in result.metrics if "eval/perplexity" in row] == evaluated
    names = sorted(path.name for path in (result.folder / "checkpoints").glob("step-*"))
    assert names == [f"step-{step:08d}" for step in saved]
    steps = [row["step"] for row in result.metrics]
    assert steps == sorted(set(steps))


def test_when_the_data_end_the_last_update_is_still_evaluated_and_saved_r13(tiny):
    result = tiny.run("data.on_exhausted=stop", "schedule.steps=400", "evaluate.every=0", "tracking.log_every=1000")
    last = result.metrics[-1]
    assert result.summary["status"] == "completed"
    assert 20 < last["step"] == result.summary["steps"] < 400
    assert "eval/perplexity" in last
    assert (result.folder / "checkpoints" / f"step-{last['step']:08d}").is_dir()


def test_each_seed_changes_its_own_stream_r30(tiny):
    base = tiny.run()
    weights = tiny.run("model.seed=5")
    data = tiny.run("data.seed=5")
    method = tiny.run(method="adamw:seed=5")
    assert weights.rows == base.rows
    assert weights.column("train/loss")[0] != base.column("train/loss")[0]
    assert data.rows != base.rows
    assert data.metrics[0]["eval/perplexity"] == base.metrics[0]["eval/perplexity"]
    assert method.rows == base.rows
    assert tiny.run("run.seed=9").column("train/loss") != base.column("train/loss")
    # Nothing random is left in fp32 AdamW, so another seed of the method changes nothing.
    equal_rows(method.metrics, base.metrics)


def test_loss_falls_and_unigram_is_measured(tiny):
    result = tiny.run("schedule.steps=60", "schedule.dense_rate=1e-2")
    summary = result.summary
    assert summary["perplexity"] < 0.8 * summary["unigram_perplexity"]
    assert 20 < summary["unigram_perplexity"] < 300
