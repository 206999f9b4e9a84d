"""Files of a hub that are read while they are fetched, over a real connection that misbehaves."""

import fcntl
import hashlib
import io
import multiprocessing
import os
import random
import shutil
import threading
import time

import pytest

from blockllm_cli.errors import InputError, StopRequested
from blockllm_cli.hub import shards
from blockllm_cli.hub.link import Link
from blockllm_cli.hub.remote import RemoteFile
from blockllm_cli.hub.shards import HubShard, ShardCache
from support.hub import C4, COMMIT, Rule, other_content, refused, reset_after, running_hub, trickle, truncated_to

CONTENT = random.Random(5).randbytes(300_000)
CHUNK = 80_000  # more than the bytes that count as progress
NOBODY = 10**12


def never():
    return False


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_BYTES", CHUNK)


def shard_of(hub, cache, name="a.json.gz", content=CONTENT, link=None):
    hub.add(C4, f"en/{name}", content)
    found = hashlib.sha256(content).hexdigest()
    remote = RemoteFile(C4, "dataset", COMMIT, f"en/{name}", len(content), found)
    return HubShard(remote, cache, link or Link(5.0))


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "shards", NOBODY)


def read(shard, should_stop=never):
    with shard.opened(should_stop) as file:
        return file.read()


def test_a_file_comes_whole_is_checked_and_is_not_fetched_twice(hub, cache):
    shard = shard_of(hub, cache)
    assert not cache.holds(shard.remote)
    assert read(shard) == CONTENT
    assert cache.holds(shard.remote)
    assert hub.sent["en/a.json.gz"] == len(CONTENT)
    assert read(shard) == CONTENT
    assert shard.local(never).read_bytes() == CONTENT
    assert hub.sent["en/a.json.gz"] == len(CONTENT)


def test_no_more_is_fetched_than_is_read(hub, cache):
    shard = shard_of(hub, cache)
    with shard.opened(never) as file:
        assert file.read(10) == CONTENT[:10]
    assert hub.sent["en/a.json.gz"] <= -(-(1 << 18) // CHUNK) * CHUNK  # a buffer, in whole chunks
    before = hub.sent["en/a.json.gz"]
    assert read(shard) == CONTENT
    assert hub.sent["en/a.json.gz"] == len(CONTENT) >= before  # a later reader continues behind what has come


def test_seeking_reads_what_is_there(hub, cache):
    with shard_of(hub, cache).opened(never) as file:
        file.seek(-4, os.SEEK_END)
        assert file.read() == CONTENT[-4:]
        file.seek(100_000)
        assert file.read(50) == CONTENT[100_000:100_050]
        assert file.tell() == 100_050


@pytest.mark.parametrize(
    "fault",
    [
        refused(503),
        refused(429, "0"),
        refused(404),
        reset_after(0),
        reset_after(10_000),
        truncated_to(20_000),
    ],
)
def test_faults_that_pass_change_nothing(hub, cache, fault, monkeypatch):
    monkeypatch.setattr("blockllm_cli.hub.link._FIRST_PAUSE", 0.01)
    events = []
    shard = shard_of(hub, cache, link=Link(5.0, events.append))
    hub.rules = [Rule("a.json.gz", fault, times=1), Rule("a.json.gz", fault, times=2, skip=2)]
    assert read(shard) == CONTENT
    assert len(events) == 3
    assert all(event["what"].startswith("allenai/c4/en/a.json.gz at ") for event in events)


def test_what_came_before_a_reset_is_not_asked_for_again(hub, cache, monkeypatch):
    monkeypatch.setattr("blockllm_cli.hub.link._FIRST_PAUSE", 0.01)
    shard = shard_of(hub, cache)
    hub.rules = [Rule("a.json.gz", reset_after(10_000), times=3)]
    assert read(shard) == CONTENT
    assert hub.sent["en/a.json.gz"] == len(CONTENT)


def test_a_server_that_knows_no_ranges_is_enough(hub, cache, monkeypatch):
    monkeypatch.setattr("support.hub._Answer.parse_request", _without_ranges(_answer().parse_request))
    assert read(shard_of(hub, cache)) == CONTENT


def _answer():
    from support.hub import _Answer

    return _Answer


def _without_ranges(parse):
    def parse_request(self):
        good = parse(self)
        if good:
            del self.headers["Range"]
        return good

    return parse_request


def test_a_slow_trickle_is_no_fault(hub, cache):
    events = []
    shard = shard_of(hub, cache, content=CONTENT[:30_000], link=Link(0.5, events.append))
    hub.rules = [Rule("a.json.gz", trickle(2_000, 0.02))]
    assert read(shard) == CONTENT[:30_000]
    assert events == []


def test_a_trickle_that_is_nearly_nothing_ends_the_patience(hub, cache, monkeypatch):
    monkeypatch.setattr(shards, "PROBE_SECONDS", 0.1)
    shard = shard_of(hub, cache, link=Link(0.3))
    hub.rules = [Rule("a.json.gz", trickle(10, 0.05))]
    with pytest.raises(InputError, match=r"less than 64.00 KiB came in 0.3 s.*data.retry_seconds = 0.3"):
        read(shard)
    assert 0 < shard.cache.place(shard.remote).with_name("a.json.gz.part").stat().st_size < 1000


def test_a_stop_does_not_wait_for_the_server(hub, cache):
    shard = shard_of(hub, cache)
    hub.rules = [Rule("a.json.gz", trickle(10, 0.05))]
    asked = threading.Event()
    with pytest.raises(StopRequested):
        read(shard, lambda: asked.is_set() or bool(asked.set()))


def test_another_content_is_refused_and_does_not_stay(hub, cache):
    shard = shard_of(hub, cache)
    hub.rules = [Rule("a.json.gz", other_content)]
    with pytest.raises(InputError, match="not what the hub lists"):
        read(shard)
    hub.rules = []
    assert read(shard) == CONTENT


def test_a_hub_out_of_reach_is_not_asked(hub, cache):
    shard = shard_of(hub, cache, link=Link(5.0, out_of_reach="there is no network"))
    with pytest.raises(InputError, match=r"no more of it was fetched before, and there is no network.*builtin"):
        read(shard)
    assert hub.requests == []


def test_a_session_that_another_thread_closes_is_a_fault_that_passes(hub, cache, monkeypatch):
    from huggingface_hub.utils import close_session, get_session

    monkeypatch.setattr("blockllm_cli.hub.link._FIRST_PAUSE", 0.01)
    events = []
    closed = get_session()
    close_session()
    sessions = iter([closed, closed])
    real = get_session
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: next(sessions, None) or real())
    assert read(shard_of(hub, cache, link=Link(5.0, events.append))) == CONTENT
    assert [event["reason"] for event in events] == ["the connection was closed"]


def test_refusals_for_good_are_said_with_the_way_out(hub, cache):
    hub.rules = [Rule("a.json.gz", refused(403))]
    with pytest.raises(InputError, match="the hub answered 403 Forbidden; log in"):
        read(shard_of(hub, cache))


def part_of(shard, content):
    """What a killed process left."""
    part = shard.cache.place(shard.remote).with_name("a.json.gz.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    return part


@pytest.mark.parametrize("content", [CONTENT, b""])
def test_a_part_that_is_whole_gets_its_name_without_another_byte(hub, cache, content):
    """A kill between the last byte and the comparison."""
    shard = shard_of(hub, cache, content=content)
    part_of(shard, content)
    assert shard.local(never).read_bytes() == content
    assert cache.holds(shard.remote)
    assert hub.sent["en/a.json.gz"] == 0


@pytest.mark.parametrize("content", [bytes(len(CONTENT)), CONTENT + b"more"], ids=["other", "longer"])
def test_a_part_that_is_whole_and_another_content_is_never_read(hub, cache, content):
    shard = shard_of(hub, cache)
    part = part_of(shard, content)
    with pytest.raises(InputError, match="not what the hub lists"):
        read(shard)
    assert not part.exists()
    assert read(shard) == CONTENT


def test_a_kept_file_that_was_cut_is_fetched_again(hub, cache):
    shard = shard_of(hub, cache)
    read(shard)
    os.truncate(cache.place(shard.remote), 10)
    assert read(shard) == CONTENT


def test_a_file_that_is_thrown_out_again_and_again_is_no_damage(hub, cache, monkeypatch):
    shard = shard_of(hub, cache)
    monkeypatch.setattr(ShardCache, "holds", lambda *_: False)
    with pytest.raises(InputError, match=r"raise data\.shard_cache_bytes"):
        shard.local(never)


def test_a_reader_never_empties_what_another_has_begun(hub, cache, monkeypatch):
    shard = shard_of(hub, cache)
    real = io.FileIO

    def late(path, mode="rb"):
        """The other one begins between the look for a part and its making."""
        part = cache.place(shard.remote).with_name("a.json.gz.part")
        if not part.exists() or not part.stat().st_size:
            part.write_bytes(CONTENT[:100])
        return real(path, mode)

    monkeypatch.setattr(io, "FileIO", late)
    with shard.opened(never) as file:
        assert file.read() == CONTENT
    assert hub.sent["en/a.json.gz"] == len(CONTENT) - 100


def test_a_file_whose_time_cannot_be_set_is_read(hub, cache, monkeypatch):
    shard = shard_of(hub, cache)
    read(shard)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    assert read(shard) == CONTENT


def test_without_retries_an_answer_may_take_its_time(hub, cache):
    shard = shard_of(hub, cache, content=CONTENT[:30_000], link=Link(0.0))
    hub.rules = [Rule("a.json.gz", trickle(5_000, 0.03))]
    assert read(shard) == CONTENT[:30_000]


def test_a_redirect_without_an_end_is_a_fault(hub, cache):
    def around(answer):
        answer.send(302, b"", {"Location": answer.path})
        return True

    hub.rules = [Rule("a.json.gz", around)]
    with pytest.raises(InputError, match="TooManyRedirects"):
        read(shard_of(hub, cache, link=Link(0.0)))


def test_the_token_stays_with_the_hub_when_it_sends_on_to_another_server(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    shard = shard_of(hub, cache)
    seen = []
    with running_hub() as other:
        other.files = hub.files

        def send_on(answer):
            seen.append(answer.headers["Authorization"])
            answer.send(302, b"", {"Location": other.url + answer.path})
            return True

        def look(answer):
            seen.append(answer.headers["Authorization"])
            return False

        hub.rules, other.rules = [Rule("a.json.gz", send_on)], [Rule("a.json.gz", look)]
        assert read(shard) == CONTENT
    assert set(seen[::2]) == {"Bearer hf_secret"}
    assert set(seen[1::2]) == {None}


@pytest.mark.parametrize("when", ["-5", "²", "9" * 400, "garbage", "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"])
def test_an_odd_time_to_come_back_is_no_bug(hub, cache, when):
    hub.rules = [Rule("a.json.gz", refused(503, when))]
    with pytest.raises(InputError, match="503 Service Unavailable"):
        read(shard_of(hub, cache, link=Link(0.0)))


def test_a_wait_for_another_reader_has_words(hub, cache):
    shard = shard_of(hub, cache)
    lock = cache.place(shard.remote).with_name("a.json.gz.lock")
    lock.parent.mkdir(parents=True)
    end = time.monotonic() + 10
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StopRequested):
            read(shard, lambda: shard.link.doing != "" or time.monotonic() > end)
    assert "which another reader of" in shard.link.doing


def test_the_least_recently_used_files_go_when_the_bound_is_passed(hub, tmp_path):
    cache = ShardCache(tmp_path / "shards", 2 * len(CONTENT))
    kept = [shard_of(hub, cache, f"{i}.json.gz", bytes([i]) * len(CONTENT)) for i in range(4)]
    for i in (0, 1, 0):
        read(kept[i])
        os.utime(cache.place(kept[i].remote), (1000 + len(hub.requests), 1000 + len(hub.requests)))
    os.utime(cache.place(kept[0].remote), (5000, 5000))
    with kept[1].opened(never) as file:
        os.utime(cache.place(kept[1].remote), (2000, 2000))
        assert read(kept[2]) == bytes([2]) * len(CONTENT)
        read(kept[3])
        assert not cache.holds(kept[1].remote)
        assert file.read() == bytes([1]) * len(CONTENT)  # what is open stays readable
    held = [cache.holds(shard.remote) for shard in kept]
    assert held[3]
    assert sum(held) <= 3
    assert not held[1]


def test_a_bound_of_nothing_keeps_what_is_in_use(hub, tmp_path):
    shard = shard_of(hub, ShardCache(tmp_path / "shards", 0))
    assert read(shard) == CONTENT
    assert shard.cache.holds(shard.remote)
    assert hub.sent["en/a.json.gz"] == len(CONTENT)


def test_readers_of_one_file_share_what_comes(hub, cache):
    shard = shard_of(hub, cache)
    found = []
    threads = [threading.Thread(target=lambda: found.append(read(shard))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4
    assert hub.sent["en/a.json.gz"] == len(CONTENT)


def test_a_part_that_is_thrown_out_while_it_grows_does_no_harm(hub, cache):
    shard = shard_of(hub, cache)
    with shard.opened(never) as file:
        first = file.read(10)
        cache.place(shard.remote).with_name("a.json.gz.part").unlink()
        assert first + file.read() == CONTENT
    assert read(shard) == CONTENT
    assert cache.holds(shard.remote)


def test_a_cache_that_is_removed_in_mid_file_is_made_again(hub, cache):
    shard = shard_of(hub, cache)
    with shard.opened(never) as file:
        begun = file.read(10)
        shutil.rmtree(cache.folder)
        assert begun + file.read() == CONTENT
    assert hub.sent["en/a.json.gz"] == len(CONTENT)
    assert read(shard) == CONTENT


def _read_in_process(place, limit, remote, url, answers):
    os.environ["HF_ENDPOINT"] = url
    shard = HubShard(remote, ShardCache(place, limit), Link(5.0))
    answers.put(read(shard) == CONTENT)


@pytest.mark.slow
def test_processes_share_what_comes(hub, cache):
    shard = shard_of(hub, cache)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_read_in_process, args=(cache.folder, NOBODY, shard.remote, hub.url, answers))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    assert [answers.get(timeout=60) for _ in processes] == [True, True]
    for process in processes:
        process.join()
    assert hub.sent["en/a.json.gz"] == len(CONTENT)
