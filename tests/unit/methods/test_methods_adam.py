"""Adam as a method: decay is an L2 term in the gradient."""

import torch

from blockllm_cli.methods.base import Rates
from support.methods import LENGTH, ROWS, drive_update, make_method, toy_batch, toy_llama


def test_is_torchs_adam_to_the_bit():
    mine, theirs = toy_llama(), toy_llama()
    method = make_method("adam", weight_decay=0.1)
    method.prepare(mine)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(1, 51):
        drive_update(method, mine, step, Rates(1e-2, 1e-2))
        optimizer.zero_grad()
        theirs.loss(toy_batch(step), scale=1.0 / (ROWS * LENGTH))[0].backward()
        optimizer.step()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(mine.get_parameter(name), parameter), name


def test_without_decay_it_is_adamw():
    models = []
    for name in ("adam", "adamw"):
        method, model = make_method(name), toy_llama()
        method.prepare(model)
        for step in range(1, 6):
            drive_update(method, model, step, Rates(1e-3, 1e-2))
        models.append(model)
    for left, right in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(left, right)


def test_decay_passes_through_the_moments():
    """The first update has the size of the rate, not of rate times decay."""
    method, model = make_method("adam", weight_decay=0.5), toy_llama()
    method.prepare(model)
    before = model.model.norm.weight.detach().clone()
    method.update(1, Rates(0.1, 0.1), {name: torch.zeros_like(p) for name, p in model.named_parameters()}, 1.0)
    torch.testing.assert_close(model.model.norm.weight.detach(), before - 0.1, atol=1e-6, rtol=0)
