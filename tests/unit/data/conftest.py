"""The small corpus that the tests of streams and workers read."""

import pytest
from small_streams import good, write_shards

from blockllm_cli.data.corpus import Corpus


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    """38 good documents in 3 shards, with bad and empty ones among them."""
    lines = [good(i) for i in range(38)]
    for place, line in ((0, "broken"), (9, '{"text": " "}'), (20, '{"text": null}'), (30, '{"text": "a \\ud800"}')):
        lines.insert(place, line)
    return write_shards(tmp_path / "corpus", [*lines, "cut off", '{"text": ""}'], 3)
