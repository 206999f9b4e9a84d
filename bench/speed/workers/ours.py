"""The package: any method in the package's own training loop, held to what the command holds torch to.

The spec names `method`, `options` and `precision` as a recipe does, and `time`: "step" is the whole update as the loop
makes it, "update" only the method's writing of weights and state. `ahead` updates are made before the first repeat.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from blockllm_cli.data.rows import Rows
from blockllm_cli.data.stream import Taken
from blockllm_cli.heap import keep_memory
from blockllm_cli.methods.base import Method, Rates, Setting
from blockllm_cli.methods.registry import method_class
from blockllm_cli.model.llama import LlamaForCausalLM, build_model
from blockllm_cli.optim.precision import Precision, precision_of
from blockllm_cli.runner.machine import Machine, on_machine
from blockllm_cli.training.schedule import Schedule
from blockllm_cli.training.trainer import StepReport, Trainer, TrainerSettings, TrainState
from speed.models import config_of
from speed.workers.protocol import Repeat, Requests, Spec

RATE = 1e-4
STEPS = 10**9


class RandomRows:
    """Rows of random ids: all that the trainer asks of a stream."""

    events_at_end: tuple[()] = ()

    def __init__(self, spec: Spec) -> None:
        self._draw = np.random.default_rng(0)
        self._vocab_size, self._length = spec["shape"]["vocab_size"], spec["length"]

    def take(self, count: int) -> Taken:
        """`count` rows; every position has a target."""
        return Taken(random_rows(self._draw, count, self._length, self._vocab_size), [])

    def state(self) -> dict[str, Any]:
        """Nothing is resumed."""
        return {}


class NoProbe:
    """Memory is measured elsewhere."""

    def mark(self, phase: str, gradient_bytes: int) -> None:
        """Ignore a phase border."""


class Watch:
    """Stands in for a method's `update` and takes its time."""

    def __init__(self, method: Method) -> None:
        self._update = method.update
        self.wall = self.cpu = 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Update and note the seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        made = self._update(*arguments, **named)
        self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - cpu
        return made


def random_rows(draw: np.random.Generator, count: int, length: int, vocab_size: int) -> Rows:
    """`count` rows of one document each."""
    pieces = draw.integers(vocab_size, size=(count, length + 1), dtype=np.int32)
    return Rows(pieces, np.zeros_like(pieces), [("",)] * count, length)


def model_of(spec: Spec) -> LlamaForCausalLM:
    """The model of the spec with fresh weights."""
    model = build_model(config_of(spec["shape"]), seed=0, dtype=precision_of(spec["precision"]).weights)
    if spec.get("compile"):
        able: Any = model
        able.compile_layers()  # what `run.compile = "layer"` does
    return model


def method_of(spec: Spec, model: LlamaForCausalLM) -> Method:
    """The method of the spec, prepared."""
    kind = method_class(spec["method"])
    setting = Setting(0, precision_of(spec["precision"]), peak=Rates(RATE, RATE))
    method = kind(kind.Options(**spec.get("options", {})), setting)
    method.prepare(model)
    return method


def trainer_of(spec: Spec, model: LlamaForCausalLM, method: Method) -> Trainer:
    """The loop, one micro-batch an update, without clipping and without a schedule."""
    settings = TrainerSettings(
        steps=STEPS,
        rows=spec["rows"],
        micro_rows=spec["rows"],
        learning_rate=RATE,
        dense_rate=RATE,
        clip=0.0,
        on_nonfinite="stop",
        log_every=STEPS,
        device=torch.device("cpu"),
    )
    stream: Any = RandomRows(spec)
    state = TrainState(0, 0, 0, b"", np.zeros(spec["shape"]["vocab_size"], dtype=np.int64), {})
    schedule = Schedule("constant", STEPS)
    return Trainer(model, method, schedule, stream, settings, state, probe=NoProbe(), should_stop=lambda: False)


def bytes_of_update(method: Method, precision: Precision) -> int:
    """The least that an update has to move: gradient read, weight and state read and written, index read."""
    weight, moment = precision.weights.itemsize, precision.moments.itemsize
    master = 8 - weight if precision.has_master else 0  # the copy is read and written, the weight only written
    entry = precision.accumulator(1).itemsize + 2 * weight + 4 * moment + master
    indices = sum(each.tensor.numel() * each.tensor.itemsize for each in method.held() if each.category == "indices")
    return method.trainable_entries * entry + indices


def note(known: Repeat, report: StepReport) -> None:
    """Which update it was and, since a selection came, the share of the candidates that is not trained now."""
    known["step"] = report.step
    for event in report.events:
        if event["kind"] == "selection":
            known["untrained"] = 1 - event["kept"] / event["candidates"]


def main() -> None:
    """Train until the driver has had enough."""
    keep_memory()  # as the command does
    requests = Requests()
    spec = requests.spec
    with on_machine(Machine(torch.device("cpu"), torch.get_num_threads(), deterministic=True)):
        model = model_of(spec)
        method = method_of(spec, model)
        watch = Watch(method) if spec.get("time") == "update" else None
        if watch is not None:
            method.update = watch  # type: ignore[method-assign]  # what is measured is exactly this call
        reports = trainer_of(spec, model, method).updates()
        known: Repeat = {}
        for _ in range(spec.get("ahead", 0)):
            note(known, next(reports))
        requests.ready("torch", threads=torch.get_num_threads())
        for repeat in requests.repeats():
            note(known, next(reports))
            repeat |= known
            if watch is not None:
                moved = bytes_of_update(method, precision_of(spec["precision"]))
                repeat |= {"wall": watch.wall, "cpu": watch.cpu, "bytes": moved, "entries": method.trainable_entries}


if __name__ == "__main__":
    main()
