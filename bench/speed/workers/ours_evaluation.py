"""The package's evaluation of a fixed set of rows."""

from __future__ import annotations

import numpy as np
import torch

from blockllm_cli.heap import keep_memory
from blockllm_cli.runner.machine import Machine, on_machine
from blockllm_cli.training.evaluation import Evaluator
from speed.workers.ours import model_of, random_rows
from speed.workers.protocol import Requests


def main() -> None:
    """Evaluate the same rows again and again."""
    keep_memory()  # as the command does
    requests = Requests()
    spec = requests.spec
    rows = random_rows(np.random.default_rng(0), spec["rows"], spec["length"], spec["shape"]["vocab_size"])
    device = torch.device("cpu")
    evaluator = Evaluator(rows, batch_rows=spec["rows"], legacy_rows=spec["rows"], legacy_ranks=1, device=device)
    with on_machine(Machine(device, torch.get_num_threads(), deterministic=True)):
        model = model_of(spec)
        requests.ready("torch", threads=torch.get_num_threads())
        for _ in requests.repeats():
            evaluator.evaluate(model, lambda: False)


if __name__ == "__main__":
    main()
