"""Lion against the paper's two lines, and against the contract of every method."""

import pytest
import torch

from blockllm_cli.testing import cases
from blockllm_lion import Lion, LionRule


@pytest.mark.parametrize("case", cases(Lion), ids=str)
def test_contract(case):
    case()


def test_the_rule_is_that_of_the_paper():
    draw = torch.Generator().manual_seed(0)
    weight, momentum = torch.randn(7, 5, generator=draw), torch.zeros(7, 5)
    expected, average = weight.clone(), momentum.clone()
    for step in range(1, 6):
        gradient = torch.randn(7, 5, generator=draw)
        LionRule((0.9, 0.99), 0.1).apply([weight], [gradient], [[momentum]], step=step, lr=1e-2)
        direction = (0.9 * average + 0.1 * gradient).sign()
        expected = expected - 1e-2 * (direction + 0.1 * expected)
        average = 0.99 * average + 0.01 * gradient
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(momentum, average, atol=1e-6, rtol=0)
