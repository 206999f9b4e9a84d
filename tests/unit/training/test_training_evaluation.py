import math

import numpy as np
import pytest

from blockllm_cli.training.evaluation import legacy_loss, perplexity_of, unigram_perplexity


@pytest.mark.parametrize("case", ["n1", "n5", "n40"])
def test_legacy_and_true_value_equal_the_recorded_loop(golden, case):
    """golden/eval_bias: GaLore's evaluation loop, run on these batch losses."""
    recorded = golden("eval_bias")
    targets = recorded[f"{case}.row_lengths"].numpy().astype(np.int64) - 1
    nll = recorded[f"{case}.batch_loss"].numpy()[:, None] * targets
    flat_nll, flat_targets = nll.reshape(-1), targets.reshape(-1)
    assert legacy_loss(flat_nll, flat_targets, batch_rows=4) == pytest.approx(
        recorded[f"{case}.legacy_loss"].item(), rel=1e-6
    )
    assert flat_nll.sum() / flat_targets.sum() == pytest.approx(recorded[f"{case}.token_weighted"].item(), rel=1e-6)


@pytest.mark.parametrize(("rows", "ranks", "count"), [(8, 1, 4), (8, 2, 2), (9, 1, 5), (9, 2, 3), (1, 8, 1)])
def test_legacy_counts_batches_per_rank_r05(rows, ranks, count):
    """Equal losses L must give L x N / (N + 1) with N = ceil(rows / (batch rows x ranks))."""
    nll, targets = np.full(rows, 20.0), np.full(rows, 10)
    assert legacy_loss(nll, targets, batch_rows=2, ranks=ranks) == pytest.approx(2.0 * count / (count + 1))


def test_unigram_perplexity_by_hand():
    train, validation = np.array([3, 0, 1]), np.array([1, 1, 0])
    expected = math.exp(-(math.log(4 / 7) + math.log(1 / 7)) / 2)
    assert unigram_perplexity(train, validation) == pytest.approx(expected)
    assert unigram_perplexity(np.zeros(5, np.int64), np.array([1, 0, 0, 0, 2])) == pytest.approx(5.0)


def test_an_overflow_is_infinite():
    assert perplexity_of(1e4) == math.inf
    assert perplexity_of(math.log(20)) == pytest.approx(20)
