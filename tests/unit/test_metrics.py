import json

import numpy as np
import pytest

from blockllm_cli import metrics
from blockllm_cli.methods.base import Rates
from blockllm_cli.training.evaluation import Evaluation
from blockllm_cli.training.trainer import StepReport, TrainState

STATE = TrainState(3, 100, 120, b"", np.zeros(4, np.int64), {})


def report(**changes):
    values = {
        "step": 3,
        "loss": 2.5,
        "gradient_norm": 0.5,
        "rates": Rates(1e-3, 1e-2),
        "targets": 30,
        "slots": 40,
        "skipped": False,
        "unchanged": None,
    }
    return StepReport(**(values | changes))


def test_a_row_is_plain_json_even_where_numbers_are_not():
    row = metrics.counter_row(STATE) | metrics.train_row(report(loss=float("nan"), skipped=True))
    row |= metrics.evaluation_row(Evaluation(float("inf"), 10, float("inf"), float("inf"), 5.0), 7.0)
    text = json.dumps(row, allow_nan=False)
    assert json.loads(text)["train/loss"] is None
    assert row["eval/perplexity"] is None
    assert row["train/skipped"] is True


def test_optional_keys_are_absent_where_nothing_was_counted():
    row = metrics.train_row(report())
    assert "train/skipped" not in row
    assert "train/unchanged_fraction" not in row
    assert metrics.throughput_row(targets=0, slots=0, seconds=0.0, updates=0) == {}


def test_throughput_is_of_the_window():
    row = metrics.throughput_row(targets=100, slots=200, seconds=4.0, updates=8)
    assert row == {
        "throughput/tokens_per_second": 25.0,
        "throughput/slots_per_second": 50.0,
        "time/step_seconds": 0.5,
    }


@pytest.mark.parametrize(
    ("key", "machine"),
    [
        ("throughput/tokens_per_second", True),
        ("time/step_seconds", True),
        ("memory/rss_bytes", True),
        ("memory/peak_rss_bytes", True),
        ("memory/weights_bytes", False),
        ("train/loss", False),
        ("eval/perplexity", False),
    ],
)
def test_what_two_equal_runs_may_differ_in(key, machine):
    assert metrics.is_about_the_machine(key) is machine
