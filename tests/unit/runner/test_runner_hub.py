"""Whole runs on a hub shaped like C4's, through the real client libraries, while the network fails (R23, R24)."""

import errno
import gzip
import json
import shutil
import threading
import time

import pytest

from blockllm_cli.app import main
from blockllm_cli.durable import storage_errors
from blockllm_cli.errors import InputError, InterruptedRunError, StorageError
from blockllm_cli.hub import shards
from support.hub import C4, Rule, like_c4, other_content, refused, reset_after, trickle, truncated_to
from support.tiny import equal_rows, equal_tensors

FROM_HUB = ("data.corpus=c4", "data.retry_seconds=5", "schedule.steps=16")
STEPS = "schedule.steps=16"
TRAIN = "en/c4-train"


@pytest.fixture
def c4(hub, tiny, tmp_path, monkeypatch):
    """A hub with the tiny corpus, and the same shards as files under tmp_path/files."""
    monkeypatch.setattr(shards, "CHUNK_BYTES", 1000)
    monkeypatch.setattr("blockllm_cli.hub.link._FIRST_PAUSE", 0.01)
    folder = tmp_path / "files"
    folder.mkdir()
    sides = {}
    for side, paths in (
        ("train", sorted(tiny.corpus.glob("train-*.jsonl"))),
        ("validation", [tiny.corpus / "validation.jsonl"]),
    ):
        sides[side] = {
            f"c4-{side}.{i:05d}-of-{len(paths):05d}.json.gz": gzip.compress(path.read_bytes(), mtime=0)
            for i, path in enumerate(paths)
        }
        for name, content in sides[side].items():
            (folder / name).write_bytes(content)
    like_c4(hub, sides["train"], sides["validation"])
    hub.add("google-t5/t5-base", "spiece.model", tiny.tokenizer.read_bytes(), kind="models")
    return hub


@pytest.fixture
def from_files(c4, tiny, tmp_path):
    """The same run from files."""
    folder = tmp_path / "files"
    return tiny.run(STEPS, f"data.train={folder}/c4-train.*", f"data.validation={folder}/c4-validation.*")


def same(one, other):
    equal_rows(one.metrics, other.metrics)
    equal_tensors(one.tensors(), other.tensors())
    assert one.rows == other.rows
    assert one.summary["train_rows_sha256"] == other.summary["train_rows_sha256"]
    assert one.summary["validation_sha256"] == other.summary["validation_sha256"]


def test_a_run_from_the_hub_is_the_run_from_files(c4, tiny, from_files):
    run = tiny.run(*FROM_HUB)
    same(run, from_files)
    assert run.events[0] == {
        "step": 0,
        "kind": "corpus",
        "repository": C4,
        "commit": c4.commit,
        "shards": 3,
    }
    assert [event for event in run.events if event["kind"] == "network"] == []


def test_the_tokenizer_of_a_repository_is_the_file_in_it(c4, tiny, from_files):
    run = tiny.run(*FROM_HUB, "tokenizer.source=hub", "tokenizer.path=google-t5/t5-base")
    same(run, from_files)
    assert c4.requests.count("HEAD /") == 1  # one probe a run, whatever is asked for
    assert (run.folder / "tokenizer.model").read_bytes() == tiny.tokenizer.read_bytes()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (refused(503), "503 Service Unavailable"),
        (refused(503, "0"), "503 Service Unavailable"),
        (refused(429), "429 Too Many Requests"),
        (refused(429, "1"), "429 Too Many Requests"),
        (reset_after(300), "without sending complete message body"),
        (truncated_to(700), "of "),
    ],
    ids=["503", "503-retry-after", "429", "429-retry-after", "reset", "truncated"],
)
def test_faults_that_pass_leave_the_rows_as_they_are_and_are_events(c4, tiny, from_files, fault, said):
    c4.rules = [Rule(TRAIN, fault, times=2), Rule(TRAIN, fault, times=1, skip=4)]
    run = tiny.run(*FROM_HUB)
    same(run, from_files)
    faults = [event for event in run.events if event["kind"] == "network"]
    assert len(faults) == 3
    assert all(said in event["reason"] and TRAIN in event["what"] for event in faults)
    assert run.output.count("network: allenai/c4/en/c4-train") == 3


def test_every_third_read_fails_r23(c4, tiny, from_files):
    c4.rules = [Rule(TRAIN, refused(500), times=1, skip=2) for _ in range(30)]
    same(tiny.run(*FROM_HUB), from_files)


def test_a_slow_trickle_gives_the_same_rows(c4, tiny, from_files):
    c4.rules = [Rule(TRAIN, trickle(200, 0.002))]
    same(tiny.run(*FROM_HUB), from_files)


@pytest.mark.parametrize("fault", [refused(503), reset_after(100), truncated_to(10)], ids=["503", "reset", "truncated"])
def test_a_hub_that_fails_for_good_ends_the_run_after_it_saved(c4, tiny, from_files, fault):
    c4.rules = [Rule(f"{TRAIN}.*", fault, skip=2)]
    sets = (*FROM_HUB, "data.retry_seconds=0.3", "data.block_documents=16")
    with pytest.raises(InputError, match=r"data.retry_seconds = 0.3 allows no more.*\n.*--resume") as caught:
        tiny.run(*sets)
    assert caught.value.exit_code == 3
    cut = tiny.newest()
    step = cut.summary["steps"]
    assert cut.summary["status"] == "failed"
    assert f"saved at update {step}; continue with: blockllm pretrain --resume" in cut.summary["message"]
    assert [path.name for path in (cut.folder / "checkpoints").glob("step-*")] == [f"step-{step:08d}"]
    c4.rules = []
    resumed = tiny.run(*sets, "data.retry_seconds=5", resume=cut.folder)
    unbroken = tiny.run(*sets, "data.retry_seconds=5")
    same(resumed, unbroken)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_fills_up_ends_the_run_after_it_saved(c4, tiny, tmp_path, monkeypatch, workers):
    few = ("schedule.steps=30", "batch.rows=32", "data.block_documents=16", f"data.workers={workers}")
    sets = (*FROM_HUB, *few, f"data.cache={tmp_path / 'cache'}")
    append, appended = shards._Fetched._append, set()

    def full(self, content, at):
        with storage_errors(self._part, "write", option="data.cache"):
            appended.add(self._part)
            if len(appended) > 2:  # at the second shard of training
                raise OSError(errno.ENOSPC, "No space left on device")
        append(self, content, at)

    with monkeypatch.context() as patch:
        patch.setattr(shards._Fetched, "_append", full)
        with pytest.raises(
            StorageError, match=r"No space left.*data\.cache.*\nsaved at update \d+; continue with"
        ) as caught:
            tiny.run(*sets)
    assert caught.value.exit_code == 6
    cut = tiny.newest()
    step = cut.summary["steps"]
    assert step > 0
    assert [path.name for path in (cut.folder / "checkpoints").glob("step-*")] == [f"step-{step:08d}"]
    same(tiny.run(*sets, resume=cut.folder), tiny.run(*sets))


def test_a_disk_that_takes_neither_data_nor_checkpoint_is_named_for_both(c4, tiny, monkeypatch):
    def full(*_, **__):
        raise StorageError("no space left")

    monkeypatch.setattr("blockllm_cli.training.trainer.Trainer.updates", full)
    monkeypatch.setattr("blockllm_cli.runner.loop.save_checkpoint", full)
    with pytest.raises(StorageError, match=r"^no space left\nand the run is not saved: no space left$"):
        tiny.run(*FROM_HUB)


def test_another_content_than_listed_ends_the_run(c4, tiny):
    c4.rules = [Rule(f"{TRAIN}.*", other_content)]
    with pytest.raises(InputError, match=r"bad|not what the hub lists"):
        tiny.run(*FROM_HUB, "data.max_bad_documents=0")


def test_a_resume_fetches_nothing_again_and_asks_only_for_the_list(c4, tiny):
    cut = tiny.run(*FROM_HUB, "data.block_documents=16", stop_after=3)
    before = c4.shards_sent()
    c4.requests.clear()
    resumed = tiny.run(*FROM_HUB, "data.block_documents=16", resume="latest")
    total = sum(len(c4.files["datasets", C4, path]) for path in c4.sent if path.endswith(".gz"))
    assert 0 < before <= total
    assert c4.shards_sent() <= total  # every byte once, over both processes
    assert resumed.folder == cut.folder


def test_a_new_commit_with_the_same_shards_is_the_same_corpus_and_other_shards_are_not(c4, tiny):
    tiny.run(*FROM_HUB, stop_after=3)
    c4.commit = "f" * 40
    c4.add(C4, "README.md", c4.files["datasets", C4, "README.md"] + b"\nA word more.\n")
    tiny.run(*FROM_HUB, resume="latest", stop_after=6)
    name = next(path for _, _, path in c4.files if path.startswith(TRAIN))
    c4.add(C4, name, gzip.compress(b'{"text": "something else"}\n'))
    with pytest.raises(InputError, match=r"training files are not those of the checkpoint.*data\.revision=COMMIT"):
        tiny.run(*FROM_HUB, resume="latest")


def test_a_run_goes_on_at_the_commit_it_began_with_when_the_main_branch_has_moved(c4, tiny, from_files):
    cut = tiny.run(*FROM_HUB, stop_after=3)
    before = dict(c4.files)
    name = next(path for _, _, path in c4.files if path.startswith(TRAIN))
    first, c4.commit = c4.commit, "f" * 40
    c4.add(C4, name, gzip.compress(b'{"text": "something else"}\n'))
    with pytest.raises(InputError, match="training files are not those"):
        tiny.run(*FROM_HUB, resume="latest")
    assert cut.events[0]["commit"] == first
    c4.commit, c4.files = first, before  # as the hub answers when it is asked for that commit
    same(tiny.run(*FROM_HUB, f"data.revision={first}", resume="latest"), from_files)


def test_what_was_fetched_needs_no_network_r24(c4, tiny, monkeypatch):
    first = tiny.run(*FROM_HUB)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    c4.requests.clear()
    second = tiny.run(*FROM_HUB)
    same(first, second)
    assert c4.requests == []
    assert "HF_HUB_OFFLINE is set: going on with what was fetched of allenai/c4 (en) before" in second.output


def test_offline_with_part_of_the_shards_it_saves_and_goes_on_online_exactly_r24(c4, tiny, monkeypatch):
    sets = (*FROM_HUB, "data.block_documents=16", "schedule.steps=110", "evaluate.every=0")
    c4.rules = [Rule(f"{TRAIN}.*", refused(503), skip=6)]  # the first shard comes, the others do not
    with pytest.raises(InputError, match="503"):
        tiny.run(*sets, "data.retry_seconds=0.2")
    cut = tiny.newest()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE is set.*\n.*continue with: blockllm pretrain --resume"):
        tiny.run(*sets, "data.retry_seconds=0.2", resume=cut.folder)
    assert tiny.newest().summary["steps"] == cut.summary["steps"] > 0
    monkeypatch.delenv("HF_HUB_OFFLINE")
    c4.rules = []
    same(tiny.run(*sets, resume=cut.folder), tiny.run(*sets))


def test_shards_that_are_damaged_on_the_hub_too_are_read_as_their_files_are(c4, tiny, tmp_path):
    """What comes is what the hub lists; the damage costs the rest of a shard, as in a file (R25)."""
    folder = tmp_path / "files"
    for path in folder.glob("c4-train.*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
        c4.add(C4, f"en/{path.name}", bytes(content))
    files = (f"data.train={folder}/c4-train.*", f"data.validation={folder}/c4-validation.*")
    sets = ("schedule.steps=60", "evaluate.every=0")
    local, remote = tiny.run(*files, *sets), tiny.run(*FROM_HUB, *sets)
    same(remote, local)
    found = [
        [(event["line"], event["reason"]) for event in run.events if event["kind"] == "bad_document"]
        for run in (local, remote)
    ]
    assert found[0] == found[1] != []
    with pytest.raises(InputError, match=r"data.max_bad_documents = 0 allows no more"):
        tiny.run(*FROM_HUB, *sets, "data.max_bad_documents=0")


def test_without_a_network_the_ways_that_need_none_are_named_soon_and_nothing_is_left(c4, tiny, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"cannot be reached.*data\.corpus=builtin.*data\.corpus=files") as caught:
        tiny.run(*FROM_HUB)
    assert time.monotonic() - begun < 60
    assert caught.value.exit_code == 3
    assert not (tiny.folder / "runs").exists()


def test_a_stop_while_the_hub_does_not_answer_saves(c4, tiny, monkeypatch):
    """R11: the server hangs in the middle of a shard."""
    import os
    import signal

    hang = threading.Event()
    begun = threading.Event()

    def hanging(answer):
        begun.set()
        hang.wait(60)
        return True

    c4.rules = [Rule(f"{TRAIN}.*", hanging, skip=3)]
    sender = threading.Thread(target=lambda: (begun.wait(60), time.sleep(0.3), os.kill(os.getpid(), signal.SIGINT)))
    sender.start()
    try:
        with pytest.raises(InterruptedRunError, match="saved; continue with"):
            tiny.run(*FROM_HUB, "data.block_documents=16", "data.retry_seconds=100")
    finally:
        hang.set()
        sender.join()
    c4.rules = []
    resumed = tiny.run(*FROM_HUB, "data.block_documents=16", resume="latest")
    same(resumed, tiny.run(*FROM_HUB, "data.block_documents=16"))


def test_a_wait_is_spoken_of(c4, tiny, monkeypatch):
    monkeypatch.setattr("blockllm_cli.runner.watchdog.FIRST_WORD_SECONDS", 0.1)
    c4.rules = [Rule(f"{TRAIN}.*", refused(503, "1"), times=1)]
    run = tiny.run(*FROM_HUB)
    assert "waiting for data since" in run.output
    assert "503 Service Unavailable; attempt 2 follows within 1 s" in run.output


def test_any_dataset_of_the_hub_is_a_corpus(c4, tiny, from_files):
    """Splits by name, or files by pattern; without a validation split some documents are held out."""
    hub = ("data.corpus=hub", f"data.repository={C4}", STEPS)
    same(tiny.run(*hub, "data.configuration=en"), from_files)
    same(tiny.run(*hub, 'data.train=["en/c4-train.*"]', "data.validation=validation"), from_files)
    held_out = tiny.run(*hub, "data.configuration=realnewslike", stop_after=2)
    assert held_out.summary["status"] == "stopped"
    with pytest.raises(InputError, match=r"data.train: allenai/c4 has no split 'test'.*splits are train, validation"):
        tiny.run(*hub, "data.train=test")


def test_parquet_of_the_hub_is_fetched_whole_and_read(hub, tiny):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [json.loads(line)["text"] for path in tiny.corpus.glob("train-*") for line in path.read_text().splitlines()]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer)
    hub.add("some/one", "data/train-00000-of-00001.parquet", buffer.getvalue())
    run = tiny.run("data.corpus=hub", "data.repository=some/one", STEPS, stop_after=2)
    assert run.summary["status"] == "stopped"


def test_what_was_prepared_needs_no_network_and_no_fetched_files(c4, tiny, from_files, tmp_path, capsys, monkeypatch):
    """R24: found by content, while nothing of the hub can be reached and its files are gone from the cache."""
    cache = tmp_path / "cache"
    keys = (*FROM_HUB, f"data.cache={cache}")
    arguments = [part for key in keys for part in ("--set", key)]
    assert main(["data", "prepare", str(tiny.recipe), "--all", "--workers", "0", "--json", *arguments]) == 0
    assert len(json.loads(capsys.readouterr().out)["made"]) == 4
    shutil.rmtree(cache / "hub" / "shards")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = len(c4.requests)
    run = tiny.run(*keys)
    assert "4 of 4 shards are prepared" in run.output
    assert len(c4.requests) == before
    same(run, from_files)
