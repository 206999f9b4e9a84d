"""The processes and the thread behind a stream: what they may not do, and that they end."""

import os
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from multiprocessing import active_children

import psutil
import pytest
from small_streams import good, settings, taken, walk, write_shards
from word_tokenizer import FailingTokenizer, TorchFreeTokenizer, WordTokenizer

from blockllm_cli.data import prefetch
from blockllm_cli.data.stream import RowStream, rows_digest
from blockllm_cli.errors import BlockLLMError, InputError

PATIENCE_SECONDS = 60
SEARCH_PATH = os.pathsep.join(sys.path)  # a program of its own imports what we import, and the tokenizer beside us


def wait_until(condition) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "gave up waiting"
        time.sleep(0.02)


def test_any_locale_and_a_path_with_space_and_umlaut(tmp_path):
    """R25, R32: two spawned workers under LC_ALL=C."""
    folder = tmp_path / "mit Leerzeichen und Ümlaut"
    corpus = write_shards(folder, ['{"text": "naïve – 日本 one"}', '{"text": "caf\ufffd two"}', "broken"], 1)
    program = (
        "import sys; from pathlib import Path\n"
        "from word_tokenizer import WordTokenizer\n"
        "from blockllm_cli.data.corpus import found_files, Corpus\n"
        "from blockllm_cli.data.stream import RowStream, StreamSettings, rows_digest\n"
        "if __name__ == '__main__':\n"
        "    keys = StreamSettings(seed=5, sequence_length=6, block_documents=1, workers=2)\n"
        "    corpus = Corpus(found_files('data.train', sys.argv[1]))\n"
        "    with RowStream(corpus, WordTokenizer(), settings=keys) as stream:\n"
        "        print(rows_digest(b'', stream.take(9).rows).hex())\n"
    )
    script = folder / "programm ü.py"
    script.write_text(program, encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONPATH"] = SEARCH_PATH
    command = [sys.executable, str(script), str(folder / "*.jsonl")]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    with RowStream(corpus, WordTokenizer(), settings=settings(block_documents=1)) as stream:
        assert done.stdout.decode().strip() == rows_digest(b"", stream.take(9).rows).hex()


def left_behind() -> list:
    return [*active_children(), *(thread for thread in threading.enumerate() if thread.name == "blockllm-reader")]


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_leaves_nothing_behind(corpus, workers):
    stream = RowStream(corpus, WordTokenizer(), settings=settings(workers=workers))
    stream.take(30)
    assert len(left_behind()) == workers + 1
    stream.close()
    assert left_behind() == []
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        stream.take(10_000)
    with pytest.raises(ZeroDivisionError), RowStream(corpus, WordTokenizer(), settings=settings(workers=workers)):
        raise ZeroDivisionError
    assert left_behind() == []


def test_closing_at_once_does_not_wait_for_work(tmp_path):
    corpus = write_shards(tmp_path, [good(i) for i in range(3000)], 1)
    for workers in (0, 1):
        RowStream(corpus, WordTokenizer(), settings=settings(workers=workers, block_documents=3000)).close()
    assert left_behind() == []


def test_a_worker_that_is_killed_is_an_error_and_no_hang(corpus):
    with RowStream(corpus, WordTokenizer(), settings=settings(workers=2)) as stream:
        stream.take(5)
        victim = active_children()[0]
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(BlockLLMError, match=rf"worker with process id {victim.pid} ended \(exit code -9\)"):
            for _ in range(1000):
                stream.take(20)
        with pytest.raises(BlockLLMError, match="ended"):
            stream.take(20)
    assert left_behind() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tokenizer_that_fails_is_an_error_that_says_how(tmp_path, workers):
    corpus = write_shards(tmp_path, [*(good(i) for i in range(30)), '{"text": "poison"}'], 1)
    with (
        pytest.raises((RuntimeError, ValueError), match="fails on purpose"),
        RowStream(corpus, FailingTokenizer(), settings=settings(workers=workers)) as stream,
    ):
        for _ in range(100):
            stream.take(10)


def test_a_tokenizer_that_cannot_be_made_in_a_worker_is_an_error(corpus):
    tokenizer = WordTokenizer()
    tokenizer.model_bytes = b"something else"
    with (
        pytest.raises(RuntimeError, match="a worker was given other bytes"),
        RowStream(corpus, tokenizer, settings=settings(workers=1)) as stream,
    ):
        stream.take(10)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_disappears_is_an_input_error_each_time(corpus, workers):
    with RowStream(corpus, WordTokenizer(), settings=settings(workers=workers, layout="truncate")) as stream:
        taken(stream, [39])
        corpus.shards[1].unlink()
        for _ in range(2):
            with pytest.raises(InputError, match=r"s1\.jsonl cannot be read"):
                for _ in range(20):
                    stream.take(39)


def test_workers_are_spawned_and_do_without_torch(corpus):
    """R32: under spawn a worker knows only what it imports; torch would cost each of them 200 MB."""
    import_module("torch")  # so that a worker that shared our modules would have it
    assert walk(corpus, [20], tokenizer=TorchFreeTokenizer(), workers=2) == walk(corpus, [20])


def test_signals_to_the_process_group_leave_workers_alone(corpus):
    """SIGINT and SIGTERM reach every process of a terminal or a job; what they mean is the main process's business."""
    whole = walk(corpus, [50] * 4)
    with RowStream(corpus, WordTokenizer(), settings=settings(workers=2)) as stream:
        for child in active_children():  # most likely before they have begun to import anything
            os.kill(child.pid, signal.SIGINT)
            os.kill(child.pid, signal.SIGTERM)
        first = taken(stream, [50])
        for child in active_children():
            os.kill(child.pid, signal.SIGINT)
            os.kill(child.pid, signal.SIGTERM)
        assert first + taken(stream, [50] * 3) == whole
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM} == set()


PARENT = """
import os, signal, sys, time
from multiprocessing import active_children
from word_tokenizer import WordTokenizer
from blockllm_cli.data.corpus import Corpus, found_files
from blockllm_cli.data.stream import RowStream, StreamSettings
if __name__ == "__main__":
    keys = StreamSettings(seed=5, sequence_length=6, block_documents=7, workers=2)
    stream = RowStream(Corpus(found_files("data.train", sys.argv[1])), WordTokenizer(), settings=keys)
    for child in active_children():  # the first processes of this program, in their first moments
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    stream.take(20)
    print(*(child.pid for child in active_children()), flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "raising":
        raise ZeroDivisionError
"""


@pytest.mark.parametrize("end", ["killed", "raising", "leaving"])
def test_workers_end_with_their_parent_however_it_ends(corpus, tmp_path, end):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    done = subprocess.run(
        [sys.executable, str(script), str(corpus.shards[0]), end],
        env={**os.environ, "PYTHONPATH": SEARCH_PATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == {"killed": -9, "raising": 1, "leaving": 0}[end]
    workers = [int(word) for word in done.stdout.split()]
    assert len(workers) == 2
    wait_until(lambda: not any(is_running(worker) for worker in workers))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_ahead_is_bounded(tmp_path, monkeypatch, workers):
    corpus = write_shards(tmp_path, [good(i) for i in range(40)], 1)
    read = []
    real = prefetch.read_blocks

    def counted(*args, **keys):
        for block in real(*args, **keys):
            read.append(block.index)
            yield block

    monkeypatch.setattr(prefetch, "read_blocks", counted)
    with RowStream(corpus, WordTokenizer(), settings=settings(workers=workers, block_documents=1)) as stream:
        stream.take(1)
        wait_until(lambda: len(read) >= workers + 2)
        time.sleep(0.3)
        assert len(read) <= 2 * workers + 4


def test_waiting_for_data_is_measured(corpus):
    with RowStream(corpus, WordTokenizer(), settings=settings(workers=1)) as stream:
        assert stream.waited_seconds == 0
        stream.take(10)
        waited = stream.waited_seconds
        assert waited > 0
        stream.take(1)
        assert stream.waited_seconds >= waited
