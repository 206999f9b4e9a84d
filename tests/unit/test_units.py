import pytest

from blockllm_cli.units import format_bytes, format_count, format_seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.17, "170 ms"), (8.26, "8.3 s"), (250, "4 min 10 s"), (7500, "2 h 05 min"), (0, "0 ms")],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (2**20, "1.00 MiB"), (1.5 * 2**30, "1.50 GiB")]
)
def test_bytes_are_binary(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(950, "950"), (58_100, "58.1k"), (58_070_000, "58.07M"), (6.74e9, "6.74B")]
)
def test_counts(count, text):
    assert format_count(count) == text
