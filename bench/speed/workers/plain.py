"""Peer: a plain torch loop over `plain_model`, with torch's fused AdamW."""

from __future__ import annotations

import torch

from speed.workers.plain_model import Llama
from speed.workers.protocol import Requests
from speed.workers.rows import autocast, dtype_of, row_ids


def main() -> None:
    """Train, or with `evaluate` in the spec run forward only."""
    requests = Requests()
    spec = requests.spec
    torch.manual_seed(0)
    model = Llama(spec["shape"], spec["length"]).to(dtype_of(spec["precision"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if spec.get("compile") else model
    rows = row_ids(spec)
    requests.ready("torch", threads=torch.get_num_threads())
    for _ in requests.repeats():
        ids = next(rows)
        with torch.inference_mode(bool(spec.get("evaluate"))), autocast(spec["precision"]):
            loss = forward(ids[:, :-1], ids[:, 1:])
        if not spec.get("evaluate"):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()  # a loop that shows its loss reads it


if __name__ == "__main__":
    main()
