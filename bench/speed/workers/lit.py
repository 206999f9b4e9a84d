"""Peer: litgpt's GPT in litgpt's own pretraining loop, which takes its batches from the requests.

The loop is `litgpt.pretrain.fit` as it is, on a Fabric: it clips to norm 1 and logs, and cannot be asked not to. The
optimizer is the fused AdamW, which litgpt itself chooses on GPUs only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import lightning
import torch
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.model import GPT
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from speed.workers.protocol import Requests, Spec
from speed.workers.rows import row_ids

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-true", "autocast": "bf16-mixed"}
STEPS = 10**6


class Asked(IterableDataset[Tensor]):
    """A batch for each repeat asked for."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Tensor]:
        rows = row_ids(self._requests.spec)
        self._requests.ready("torch", "litgpt", "lightning", threads=torch.get_num_threads())
        for _ in self._requests.repeats():
            yield next(rows)


class Few(IterableDataset[Tensor]):
    """Two batches: the loop evaluates once before it begins."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.islice(row_ids(self._spec), 2)


def config_of(spec: Spec) -> Config:
    """The same Llama in litgpt's words."""
    shape = spec["shape"]
    return Config(
        block_size=spec["length"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_embd=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        padded_vocab_size=shape["vocab_size"],
        vocab_size=shape["vocab_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-6,
        mlp_class_name="LLaMAMLP",
    )


def main() -> None:
    """Train until the driver has had enough."""
    requests = Requests()
    spec = requests.spec
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=PRECISIONS[spec["precision"]])
    fabric.seed_everything(0)
    with fabric.init_module(empty_init=True):
        module = GPT(config_of(spec))
    pretrain.initialize_weights(fabric, module, n_layer=module.config.n_layer, n_embd=module.config.n_embd)
    model = fabric.setup(torch.compile(module) if spec.get("compile") else module)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True))
    batches = (DataLoader(data, batch_size=None) for data in (Asked(requests), Few(spec)))
    training, validation = fabric.setup_dataloaders(*batches)
    pretrain.fit(
        fabric=fabric,
        devices=1,
        state={"model": model, "optimizer": optimizer, "iter_num": 0, "step_count": 0},
        train_dataloader=training,
        val_dataloader=validation,
        out_dir=Path(),
        tokenizer_dir=None,
        train=TrainArgs(
            save_interval=None,
            log_interval=10,
            global_batch_size=spec["rows"],
            micro_batch_size=spec["rows"],
            lr_warmup_steps=0,
            max_tokens=STEPS * spec["rows"] * spec["length"],
            max_norm=1.0,
            min_lr=1e-4,
        ),
        eval=EvalArgs(interval=STEPS, max_iters=1, final_validation=False),
    )


if __name__ == "__main__":
    main()
