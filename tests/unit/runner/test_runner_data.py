"""`blockllm data`: prepared runs are the unprepared ones, and rows can be read by a person."""

import json
import os
import signal

import pytest

from blockllm_cli.app import main
from blockllm_cli.data import prepared_writing
from blockllm_cli.data.tokenizer_cache import kept_tokenizer
from blockllm_cli.errors import InterruptedRunError
from blockllm_cli.runner import inputs, preparing
from support.tiny import equal_rows, equal_tensors

SIX = ("schedule.steps=6", "checkpoint.every=2", "evaluate.every=3")


@pytest.fixture
def data(tiny, capsys):
    """Calls `blockllm data` on the tiny recipe with a cache of its own and gives status, stdout and stderr."""
    cache = tiny.folder / "cache"

    def call(command: str, *arguments: str):
        status = main(["data", command, str(tiny.recipe), "--set", f"data.cache={cache}", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    call.cache = cache
    call.keys = (*SIX, f"data.cache={cache}")
    return call


def prepared(data, *arguments: str) -> dict:
    status, printed, _ = data("prepare", "--workers", "0", "--json", *arguments)
    assert status == 0
    return json.loads(printed)


def same_run(one, other) -> None:
    equal_rows(one.metrics, other.metrics)
    equal_tensors(one.tensors(), other.tensors())
    assert (one.rows, one.events) == (other.rows, other.events)
    for key in ("train_rows_sha256", "validation_sha256", "tokenizer_sha256", "perplexity"):
        assert one.summary[key] == other.summary[key]


def test_a_prepared_run_is_the_run_from_text_to_the_bit(tiny, data, monkeypatch):
    """R24: found by content, without a network; nothing is tokenised."""
    plain = tiny.run(*data.keys)
    report = prepared(data, "--all")
    assert (len(report["made"]), report["documents"], report["shards"]) == (4, 400, 4)
    monkeypatch.setattr(inputs.Tokenizer, "encode", None)
    run = tiny.run(*data.keys)
    assert "4 of 4 shards are prepared" in run.output
    assert "shards are prepared" not in plain.output
    same_run(plain, run)


def test_a_run_may_change_between_text_and_cache_at_a_resume(tiny, data):
    plain = tiny.run(*data.keys)
    begun = tiny.run(*data.keys, stop_after=2)
    prepared(data, "--all")
    middle = tiny.run(*data.keys, resume=begun.folder, stop_after=4)
    assert "4 of 4 shards are prepared" in middle.output
    ended = tiny.run(*SIX, f"data.cache={tiny.folder / 'another'}", resume=begun.folder)
    assert "shards are prepared" not in ended.output
    same_run(plain, ended)


def test_a_damaged_entry_is_noted_and_the_text_read(tiny, data):
    plain = tiny.run(*data.keys)
    prepared(data, "--all")
    for file in data.cache.rglob("ids.bin"):
        file.write_bytes(file.read_bytes()[:-2])
    run = tiny.run(*data.keys)
    assert run.output.count("is not used: ids.bin has") == 3
    assert "so it is with 1 more" in run.output
    same_run(plain, run)
    damaged = prepared(data, "--all")
    assert len(damaged["made"]) == 4


def test_only_what_the_run_reads_is_prepared_in_its_order(tiny, data):
    """Six updates of 8 rows need one shard of training, and 60 a second; a second call finds what is there."""
    first = prepared(data, *(f"--set={key}" for key in SIX))
    assert [len(first[key]) for key in ("made", "found")] == [2, 0]
    assert first["rows_wanted"] == 48 <= first["rows"]
    again = prepared(data, *(f"--set={key}" for key in SIX))
    assert [len(again[key]) for key in ("made", "found")] == [0, 2]
    more = prepared(data, "--set=schedule.steps=60")
    assert [len(more[key]) for key in ("made", "found")] == [1, 2]
    run = tiny.run(*data.keys)
    assert "3 of 4 shards are prepared" in run.output
    same_run(tiny.run(*SIX), run)


@pytest.mark.parametrize("seed", [0, 1])  # with 1 the first shard of training is another one than that of validation
@pytest.mark.parametrize("layout", ["pack", "truncate"])
def test_what_is_prepared_is_all_that_the_run_tokenises(tiny, data, monkeypatch, seed, layout):
    """With a validation set that is held out of the same files, which it reads in an order of its own."""
    recipe = tiny.recipe.read_text()
    tiny.recipe.write_text("".join(line for line in recipe.splitlines(True) if not line.startswith("validation")))
    keys = (
        f"data.seed={seed}",
        f"data.layout={layout}",
        "data.block_documents=1",
        "evaluate.tokens=20",
        "schedule.steps=2",
    )
    report = prepared(data, *(f"--set={key}" for key in ("schedule.warmup=1", *keys)))
    assert len(report["made"]) == (1 if seed == 0 else 2)
    monkeypatch.setattr(inputs.Tokenizer, "encode", None)
    assert tiny.run("schedule.warmup=1", *keys, *data.keys[len(SIX) :]).summary["status"] == "completed"


def test_the_check_finds_damage_that_sizes_do_not_show(data):
    prepared(data, "--all")
    ids = sorted(data.cache.rglob("ids.bin"))[0]
    content = ids.read_bytes()
    ids.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert prepared(data, "--all")["damaged"] == []
    report = prepared(data, "--all", "--check")
    assert (len(report["damaged"]), len(report["made"]), len(report["found"])) == (1, 1, 3)
    assert ids.read_bytes() == content


def test_what_is_printed_without_json(data):
    status, printed, _ = data("prepare", "--workers", "0", "--all")
    assert status == 0
    for words in ("4 made, 0 found, of 4", "400 (and 0 empty, 0 bad)", "bytes a token", str(data.cache)):
        assert words in printed
    assert "0 made, 4 found" in data("prepare", "--all")[1]


def test_ctrl_c_keeps_finished_shards_and_ends_with_130(data, monkeypatch, capsys):
    real, calls = prepared_writing.tokenise, []

    def striking(texts, encoder):
        calls.append(texts)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(texts, encoder)

    monkeypatch.setattr(prepared_writing, "tokenise", striking)
    monkeypatch.setattr(prepared_writing, "_BATCH_DOCUMENTS", 30)
    status, _, complaint = data("prepare", "--workers", "0", "--all")
    assert status == 130
    assert "stopped; 1 shards are prepared and stay; the same command goes on" in complaint
    assert len(list(data.cache.rglob("manifest.json"))) == 1
    assert list(data.cache.rglob("*.tmp")) == []
    monkeypatch.undo()
    assert len(prepared(data, "--all")["found"]) == 1


def test_bad_documents_are_listed_with_file_and_line(tiny, data, tmp_path):
    file = tmp_path / "odd.jsonl"
    file.write_text("broken\n" * 12 + '{"text": "a good one"}\n' * 70)
    _, printed, _ = data("prepare", "--workers", "0", "--all", "--set", f"data.train={file}")
    assert f"bad document: {file}, line 1: not valid JSON" in printed
    assert "and 2 more (--json has all)" in printed
    view = json.loads(data("inspect", "--json", "--set", f"data.train={file}")[1])
    assert [each["line"] for each in view["bad"]] == list(range(1, 13))


def test_a_disk_that_refuses_is_named_with_the_way_out(data):
    data.cache.write_text("in the way")
    status, _, complaint = data("prepare")
    assert status == 6
    assert "data.cache, or the environment variable BLOCKLLM_CACHE" in complaint
    assert "--output" not in complaint


def test_rows_are_shown_as_text_with_their_borders(tiny, data):
    status, printed, _ = data("inspect", "--rows", "20", "--block", "1")
    assert status == 0
    lines = printed.splitlines()
    assert [line.partition(":")[0] for line in lines if line.startswith("row ")] == [f"row {i}" for i in range(20)]
    assert any("<bos>Document" in line and "train-" in line for line in lines)
    assert any(line.endswith(".<eos>") for line in lines)
    assert any(line.endswith("...") for line in lines)
    assert "block 1 of epoch 0" in printed
    for words in ("documents ", "targets ", "fill of rows ", "bytes a token", "unknown pieces "):
        assert words in printed


@pytest.mark.parametrize("layout", ["pack", "truncate"])
def test_inspect_gives_the_rows_of_training(tiny, data, layout):
    """What is shown is what `rows.jsonl` of a run names, and what is counted is what is there."""
    keys = (f"data.layout={layout}", "batch.rows=4", "schedule.steps=1", "schedule.warmup=0")
    run = tiny.run(*keys)
    arguments = [part for key in keys for part in ("--set", key)]
    view = json.loads(data("inspect", "--json", "--rows", "4", *arguments)[1])
    assert [[each["document"] for each in row["stretches"]] for row in view["shown"]] == run.rows[0]["documents"]
    assert view["documents"] == 64
    assert view["fill"] > (0.98 if layout == "pack" else 0.5)
    assert sum(row["targets"] for row in view["shown"]) == run.metrics[-1]["train/tokens"]
    assert view["unknown"] == 0
    assert 1 < view["bytes"] / view["tokens"] < 6
    if layout == "truncate":
        assert all(stretch["ends"] and not stretch["begins"] for row in view["shown"] for stretch in row["stretches"])
        assert {row["padding"] + row["stretches"][0]["pieces"] for row in view["shown"]} == {32}
    prepared(data, "--all", *arguments)
    assert json.loads(data("inspect", "--json", "--rows", "4", *arguments)[1]) == view


def test_a_block_that_is_not_there_is_refused(data):
    status, _, complaint = data("inspect", "--block", "6")
    assert status == 2
    assert "--block 6: the training data have blocks 0 to 5 of 64" in complaint
    status, printed, _ = data("inspect", "--block", "5", "--rows", "0", "--epoch", "3")
    assert status == 0
    assert "block 5 of epoch 3, the last" in printed


def with_trained_tokenizer(tiny) -> None:
    recipe = tiny.recipe.read_text()
    start, end = recipe.index("[tokenizer]"), recipe.index("[data]")
    tiny.recipe.write_text(recipe[:start] + '[tokenizer]\nsource = "train"\nvocab_size = 300\n\n' + recipe[end:])


def test_a_trained_tokenizer_is_found_again_and_the_run_is_the_same(tiny, data, monkeypatch):
    with_trained_tokenizer(tiny)
    plain = tiny.run(*SIX, f"data.cache={tiny.folder / 'another'}")
    assert "trained now" in plain.output
    report = prepared(data, "--all")
    monkeypatch.setattr(inputs, "train_tokenizer", None)
    run = tiny.run(*data.keys)
    assert "trained before on the same text" in run.output
    assert "4 of 4 shards are prepared" in run.output
    assert report["tokenizer_sha256"] == run.summary["tokenizer_sha256"]
    same_run(plain, run)


def test_a_kept_tokenizer_that_is_damaged_or_for_other_text_is_not_used(tiny, data, tmp_path):
    with_trained_tokenizer(tiny)
    prepared(data)
    [model] = (data.cache / "tokenizers").glob("*.model")
    assert kept_tokenizer(model.with_suffix(".json")) is not None
    content = model.read_bytes()
    model.write_bytes(content[:-1])
    assert kept_tokenizer(model.with_suffix(".json")) is None
    assert "trained now" in data("prepare", "--workers", "0")[1]
    assert model.read_bytes() == content
    for key in ("tokenizer.kind=unigram", "tokenizer.sample_bytes=9999"):
        assert "trained now" in data("prepare", "--workers", "0", "--set", key)[1]
    assert len(list((data.cache / "tokenizers").glob("*.model"))) == 3


def test_a_tokenizer_that_cannot_be_kept_is_no_failure(tiny, data):
    with_trained_tokenizer(tiny)
    data.cache.write_text("in the way")
    run = tiny.run(*data.keys)
    assert "the tokenizer is not kept for other runs" in run.output
    assert run.summary["status"] == "completed"


def test_a_stop_before_the_first_shard_is_clean(tiny, data, monkeypatch):
    from blockllm_cli.errors import StopRequested

    def stopped(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise StopRequested

    monkeypatch.setattr(preparing, "opened_corpora", stopped)
    with pytest.raises(InterruptedRunError, match="stopped; 0 shards"):
        from blockllm_cli.tracking.terminal import Terminal

        preparing.prepare_data(preparing.PrepareRequest(str(tiny.recipe)), Terminal())
