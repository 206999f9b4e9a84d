"""Writing and reading everything a run resumes from: the package's checkpoint, and torch.save of the same tensors.

The spec's `what` is "save", "load", "torch.save" or "torch.load". All of them end on the disk or begin there; the page
cache of the system stays as it is. The package syncs, hashes and renames, torch.save does not.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockllm_cli.heap import keep_memory
from blockllm_cli.methods.base import Method
from blockllm_cli.model.llama import LlamaForCausalLM
from blockllm_cli.training.checkpoint import open_checkpoint, save_checkpoint
from speed.workers.ours import method_of, model_of
from speed.workers.protocol import Requests


def main() -> None:
    """Save or load until the driver has had enough."""
    keep_memory()  # as the command does
    requests = Requests()
    model = model_of(requests.spec)
    method = method_of(requests.spec, model)
    with tempfile.TemporaryDirectory(prefix="blockllm-bench-") as place:
        call = action(requests.spec["what"], Path(place), model, method)
        tensors = [*model.state_dict().values(), *(held.tensor for held in method.held())]
        requests.ready("torch", bytes=sum(each.numel() * each.itemsize for each in tensors))
        for _ in requests.repeats():
            call()


def action(what: str, place: Path, model: LlamaForCausalLM, method: Method) -> Callable[[], object]:
    """What one repeat does."""
    weights: dict[str, Tensor] = {name: each.detach() for name, each in model.named_parameters()}
    steps = itertools.count(1)
    file = place / "plain.pt"

    def save() -> Path:
        return save_checkpoint(
            place, step=next(steps), weights=weights, method_state=method.state_dict(), state={}, keep=1
        )

    def load(folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        with torch.no_grad():
            for name, tensor in checkpoint.weights().items():
                weights[name].copy_(tensor)
        method.load_state_dict(checkpoint.method())

    def save_plain() -> None:
        torch.save({"weights": weights, "method": method.state_dict()}, file)

    def load_plain() -> None:
        saved: dict[str, Any] = torch.load(file, weights_only=True)
        with torch.no_grad():
            for name, tensor in saved["weights"].items():
                weights[name].copy_(tensor)
        method.load_state_dict(saved["method"])

    if what == "load":
        folder = save()
        return lambda: load(folder)
    if what == "torch.load":
        save_plain()
        return load_plain
    return {"save": save, "torch.save": save_plain}[what]


if __name__ == "__main__":
    main()
