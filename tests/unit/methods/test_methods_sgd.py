"""SGD as a method."""

import pytest
import torch
from pydantic import ValidationError

from blockllm_cli.methods.base import Rates
from blockllm_cli.methods.sgd import Sgd
from support.methods import LENGTH, ROWS, drive_update, make_method, toy_batch, toy_llama


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.0}, {"nesterov": True, "weight_decay": 0.01}, {"momentum": 0.5, "weight_decay": 0.1}]
)
def test_is_torchs_sgd_to_the_bit(options):
    mine, theirs = toy_llama(), toy_llama()
    method = make_method("sgd", **options)
    method.prepare(mine)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, **{"momentum": 0.9, **options}, foreach=True)
    for step in range(1, 21):
        drive_update(method, mine, step, Rates(0.1, 0.1))
        optimizer.zero_grad()
        theirs.loss(toy_batch(step), scale=1.0 / (ROWS * LENGTH))[0].backward()
        optimizer.step()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(mine.get_parameter(name), parameter), name


def test_without_momentum_there_is_no_state():
    method = make_method("sgd", momentum=0.0)
    method.prepare(toy_llama())
    assert method.state_dict() == {"step": 0}
    assert method.state_entries == 0
    assert method.trainable_entries == sum(p.numel() for p in toy_llama().parameters())


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValidationError, match="nesterov"):
        Sgd.Options(momentum=0.0, nesterov=True)
