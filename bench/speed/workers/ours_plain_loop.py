"""The package's model in a plain loop under torch's fused AdamW, which the package's own loop is held to."""

from __future__ import annotations

import numpy as np
import torch

from blockllm_cli.data.batches import batch_of
from blockllm_cli.heap import keep_memory
from blockllm_cli.runner.machine import Machine, on_machine
from speed.workers.ours import RATE, model_of, random_rows
from speed.workers.protocol import Requests


def main() -> None:
    """Forward, backward, step; state is in the weights' dtype."""
    keep_memory()  # as the command does
    requests = Requests()
    spec = requests.spec
    draw = np.random.default_rng(0)
    with on_machine(Machine(torch.device("cpu"), torch.get_num_threads(), deterministic=True)):
        model = model_of(spec)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
        requests.ready("torch", threads=torch.get_num_threads())
        for _ in requests.repeats():
            batch = batch_of(random_rows(draw, spec["rows"], spec["length"], spec["shape"]["vocab_size"]))
            loss, nll = model.loss(batch, scale=1.0 / batch.num_targets)
            torch.autograd.backward(loss)
            nll.item()  # a loop that logs its loss reads it
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
