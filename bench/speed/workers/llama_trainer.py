"""Peer: the same model under transformers' Trainer, which owns the loop: its callback waits for the next request."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

from speed.workers.llama import llama
from speed.workers.protocol import Repeat, Requests, Spec
from speed.workers.rows import row_ids


class RandomRows(Dataset[dict[str, Any]]):
    """Rows as a dataset that Trainer indexes."""

    def __init__(self, spec: Spec) -> None:
        self._ids = next(row_ids({**spec, "rows": 64 * spec["rows"]}))[:, 1:].contiguous()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._ids[index], "labels": self._ids[index]}


class Turns(transformers.TrainerCallback):
    """Ends a repeat with every step and waits for the next to be asked for."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._repeats: Iterator[Repeat] = requests.repeats()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Everything is ready: wait for the first."""
        self._requests.ready("torch", "transformers", "accelerate", threads=torch.get_num_threads())
        self._next(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One update is done."""
        self._next(control)

    def _next(self, control: Any) -> None:
        if next(self._repeats, None) is None:
            control.should_training_stop = True


def main() -> None:
    """Train until the driver has had enough."""
    requests = Requests()
    spec = requests.spec
    with tempfile.TemporaryDirectory() as place:
        arguments = transformers.TrainingArguments(
            output_dir=place,
            max_steps=10**6,
            per_device_train_batch_size=spec["rows"],
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=0.0,
            bf16=spec["precision"] == "autocast",
            torch_compile=bool(spec.get("compile")),
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            llama(spec), arguments, train_dataset=RandomRows(spec), callbacks=[Turns(requests)]
        )
        trainer.train()


if __name__ == "__main__":
    main()
