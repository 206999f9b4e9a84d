"""Which files a dataset has: asked of a hub through the real client libraries."""

import pytest

from blockllm_cli.errors import InputError, StorageError
from blockllm_cli.hub.link import Link
from blockllm_cli.hub.listing import Wanted, fetch_listing, kept_listing
from support.hub import C4, COMMIT, Rule, like_c4, refused

SHARDS = {f"c4-train.0000{i}-of-00002.json.gz": bytes([i]) * (2000 if i else 10) for i in range(2)}
VALIDATION = {"c4-validation.00000-of-00001.json.gz": b"v" * 50}


@pytest.fixture
def c4(hub):
    like_c4(hub, SHARDS, VALIDATION)
    return hub


ENGLISH = Wanted(C4, "en")


def fetched(tmp_path, wanted=ENGLISH, retry_seconds=5.0):
    return fetch_listing(wanted, tmp_path / "lists", Link(retry_seconds), lambda: False)


def test_splits_come_with_sizes_and_hashes_and_are_kept(c4, tmp_path):
    listing = fetched(tmp_path)
    assert listing.commit == COMMIT
    assert {name: [file.name for file in files] for name, files in listing.splits.items()} == {
        "train": sorted(SHARDS),
        "validation": sorted(VALIDATION),
    }
    for file in (*listing.splits["train"], *listing.splits["validation"]):
        content = c4.files["datasets", C4, file.path]
        (tmp_path / "content").write_bytes(content)
        assert (file.size, file.is_in(tmp_path / "content")) == (len(content), True)
        (tmp_path / "content").write_bytes(content[:-1] + b"?")
        assert not file.is_in(tmp_path / "content")
    asked = len(c4.requests)
    assert kept_listing(Wanted(C4, "en"), tmp_path / "lists") == listing
    assert kept_listing(Wanted(C4, "realnewslike"), tmp_path / "lists") is None
    assert len(c4.requests) == asked


def test_the_default_configuration_is_the_one_that_the_repository_names(c4, tmp_path):
    assert fetched(tmp_path, Wanted(C4)).splits == fetched(tmp_path).splits


def test_a_damaged_list_is_no_list(c4, tmp_path):
    fetched(tmp_path)
    (kept,) = (tmp_path / "lists").iterdir()
    for content in ("{", "[]", "null", '{"splits": []}', '{"splits": {"train": [{}]}, "commit": ""}', "\x00"):
        kept.write_text(content)
        assert kept_listing(Wanted(C4, "en"), tmp_path / "lists") is None


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Wanted("no/such"), "no/such: .* has no such dataset"),
        (Wanted(C4, "de"), r"'de' not found. Available: \['en', 'realnewslike'\]"),
        (Wanted(C4, "en", "v9"), "allenai/c4 has no revision 'v9'"),
    ],
)
def test_what_is_not_there_is_said_at_once(c4, tmp_path, wanted, said):
    with pytest.raises(InputError, match=said):
        fetched(tmp_path, wanted)


def answering(body):
    def fault(answer):
        answer.send(200, body)
        return True

    return fault


@pytest.mark.parametrize("body", [b"{}", b"[]", b"null", b"<html>please log in</html>"])
@pytest.mark.parametrize("path", ["/api/datasets/[^/]+/[^/]+$", "/tree/"], ids=["info", "tree"])
def test_an_answer_that_is_none_of_a_hub_is_said(c4, tmp_path, path, body):
    c4.rules = [Rule(path, answering(body))]
    with pytest.raises(InputError, match=r"allenai/c4 .*(none of a hub's .*check HF_ENDPOINT|No .* data files found)"):
        fetched(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("one.py", b"", "scripts are no longer supported"),
        ("README.md", b"---\nconfigs: [a: {b\n---\n", "while parsing"),
        ("README.md", b"---\nconfigs: 7\n---\n", "configs"),
    ],
)
def test_a_dataset_that_the_library_refuses_is_an_input_error(hub, tmp_path, name, content, said):
    hub.add("some/one", name, content)
    hub.add("some/one", "README.md", content if name == "README.md" else b"words")
    with pytest.raises(InputError, match=f"some/one cannot be used: (.|\n)*{said}"):
        fetched(tmp_path, Wanted("some/one"))


def test_a_card_that_is_missing_for_a_moment_is_asked_for_again(c4, tmp_path):
    c4.rules = [Rule("README.md", refused(404), times=1)]
    assert fetched(tmp_path).commit == COMMIT


def test_a_disk_that_refuses_what_the_library_keeps_is_one_of_storage(c4, tmp_path, monkeypatch):
    (tmp_path / "hf").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="HF_HOME"):
        fetched(tmp_path)


def test_a_hub_that_refuses_for_good_ends_the_patience(c4, tmp_path):
    c4.rules = [Rule("/api/", refused(503, "60"))]
    with pytest.raises(InputError, match=r"the list of files of allenai/c4 \(en\): 503 .* data.retry_seconds = 0"):
        fetched(tmp_path, retry_seconds=0)


def test_a_hub_that_is_back_is_asked_again(c4, tmp_path):
    c4.rules = [Rule("/api/datasets", refused(503), times=1)]
    assert fetched(tmp_path).commit == COMMIT


def test_an_address_with_a_slash_at_its_end_is_the_address_without(c4, tmp_path, monkeypatch):
    """A mirror below a path answers "//api" with 404; the two libraries read the variable differently."""
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", c4.url + "/below/")
    assert fetched(tmp_path).commit == COMMIT
