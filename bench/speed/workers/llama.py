"""Peer: transformers' LlamaForCausalLM in a plain loop, with torch's fused AdamW."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from speed.workers.protocol import Requests, Spec
from speed.workers.rows import autocast, dtype_of, row_ids


def llama(spec: Spec) -> Any:
    """The model of the spec, a LlamaForCausalLM, with fresh weights."""
    library: Any = transformers  # its declared types lag behind the keywords that it takes
    config = library.LlamaConfig(
        **spec["shape"], max_position_embeddings=2048, use_cache=False, attn_implementation="sdpa"
    )
    torch.manual_seed(0)
    return library.LlamaForCausalLM(config).to(dtype_of(spec["precision"]))


def main() -> None:
    """Train, or with `evaluate` in the spec run forward only."""
    requests = Requests()
    spec = requests.spec
    model = llama(spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if spec.get("compile") else model
    rows = row_ids(spec)
    requests.ready("torch", "transformers", threads=torch.get_num_threads())
    for _ in requests.repeats():
        ids = next(rows)[:, 1:].contiguous()
        with torch.inference_mode(bool(spec.get("evaluate"))), autocast(spec["precision"]):
            loss = forward(input_ids=ids, labels=ids).loss
        if not spec.get("evaluate"):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()


if __name__ == "__main__":
    main()
