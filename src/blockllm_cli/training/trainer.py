"""The loop: rows in, step reports out.

One update, written once: ask the method for its passes; for each, install the routes and run every micro-batch forward
and backward; let the method choose what it will write from; check loss and kept norm, clip; update; report. The
trainer knows no method, no file and no tracker: observers read the reports it yields and cannot change it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from blockllm_cli.data.batches import batch_of, micro_batches
from blockllm_cli.data.rows import Rows
from blockllm_cli.data.stream import RowStream, Taken, rows_digest
from blockllm_cli.errors import BlockLLMError, DivergedError, InputError, StopRequested
from blockllm_cli.gradients.clip import kept_norm, scale_to
from blockllm_cli.methods.base import Event, Method, PassResult, Rates
from blockllm_cli.model.batch import Batch
from blockllm_cli.model.llama import LlamaForCausalLM
from blockllm_cli.training.passes import run_passes
from blockllm_cli.training.schedule import Schedule


class PhaseProbe(Protocol):
    """What the trainer tells an observer of memory: a phase has ended, and what the routes hold at that moment."""

    def mark(self, phase: Literal["backward", "update"], gradient_bytes: int) -> None:
        """Note the border after `phase`; `gradient_bytes` are held by routes."""


@dataclass
class TrainState:
    """What the loop itself carries from update to update, all of it in the checkpoint.

    Attributes:
        step: updates done.
        tokens: target tokens seen; padding never counts.
        slots: positions seen, padding included.
        rows_digest: running SHA-256 over the rows of every update.
        unigram_counts: how often each id was a training target, int64 (vocab_size,).
        data: position of the row stream after the last finished update.
    """

    step: int
    tokens: int
    slots: int
    rows_digest: bytes
    unigram_counts: NDArray[np.int64]
    data: dict[str, Any]


@dataclass(frozen=True)
class TrainerSettings:
    """What the recipe says about the loop.

    Attributes:
        steps: updates of the whole run.
        rows: rows per update.
        micro_rows: rows per forward and backward pass.
        learning_rate: peak rate of the body.
        dense_rate: peak rate of embedding, head and norms.
        clip: limit of the kept norm; 0 is off.
        on_nonfinite: whether a non-finite loss or norm ends the run or skips the update.
        log_every: updates between two for which counts that cost something are made.
        device: where the model is.
    """

    steps: int
    rows: int
    micro_rows: int
    learning_rate: float
    dense_rate: float
    clip: float
    on_nonfinite: Literal["stop", "skip"]
    log_every: int
    device: torch.device


@dataclass(frozen=True)
class StepReport:
    """What one update did.

    Attributes:
        step: its number, from 1.
        loss: negative log likelihood per target token of the whole batch, nats.
        gradient_norm: kept norm before clipping.
        rates: learning rates used.
        targets: target tokens of the batch.
        slots: positions of the batch, padding included.
        skipped: whether a non-finite value kept the weights unmoved.
        unchanged: share of the bf16 entries written that kept their value, on the updates that count it.
        events: lines for events.jsonl.
        labels: document labels of each row.
        seconds: wall time of the update; waiting for data is not in it.
        is_last: whether the schedule or the data end here.
    """

    step: int
    loss: float
    gradient_norm: float
    rates: Rates
    targets: int
    slots: int
    skipped: bool
    unchanged: float | None
    events: list[Event] = field(default_factory=list)
    labels: list[tuple[str, ...]] = field(default_factory=list)
    seconds: float = 0.0
    is_last: bool = False


class Trainer:
    """Runs updates until the schedule ends, the data end, or a stop is asked for.

    Args:
        model: on its device, weights in place.
        method: prepared with `model`.
        schedule: factor of the rates, a pure function of the step.
        stream: source of rows, positioned at `state`.
        settings: see `TrainerSettings`.
        state: counters; the trainer updates it in place after each finished update.
        probe: told of phase borders.
        should_stop: looked at before each micro-batch.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        method: Method,
        schedule: Schedule,
        stream: RowStream,
        settings: TrainerSettings,
        state: TrainState,
        *,
        probe: PhaseProbe,
        should_stop: Callable[[], bool],
    ) -> None:
        self.model = model
        self.method = method
        self.state = state
        self._schedule = schedule
        self._stream = stream
        self._settings = settings
        self._probe = probe
        self._should_stop = should_stop

    def updates(self) -> Iterator[StepReport]:
        """Yield a report after each update; ends after the last one or when the data end.

        Raises:
            StopRequested: seen before the update in hand had changed anything; `state` is that of the last finished
                update.
            DivergedError: loss or kept norm is not finite and the recipe says stop; no weight was changed by it.
            InputError: the data end before the first update, or cannot be read.
        """
        taken = self._next()
        if taken is None and self.state.step == 0:
            raise InputError(
                f"the training data give fewer rows than one update needs (batch.rows = {self._settings.rows}); lower "
                'batch.rows or data.sequence_length, give more data, or set data.on_exhausted = "repeat"'
            )
        while taken is not None:
            started = time.perf_counter()
            report = self._update(self.state.step + 1, taken, started)
            self._advance(taken.rows, report.targets)
            # The next rows are asked for before this update is reported, since only they tell whether it was the last;
            # what goes wrong with them belongs to the next update and must not swallow this report.
            failure: Exception | None = None
            try:
                taken = self._next()
            except (StopRequested, BlockLLMError) as error:
                failure, taken = error, None
            is_last = taken is None and failure is None
            yield replace(
                report, is_last=is_last, events=report.events + (self._stream.events_at_end if is_last else [])
            )
            if failure is not None:
                raise failure

    def _next(self) -> Taken | None:
        """Rows of the next update, or None if there is none."""
        if self.state.step >= self._settings.steps:
            return None
        return self._stream.take(self._settings.rows)

    def _update(self, step: int, taken: Taken, started: float) -> StepReport:
        rows, events = taken.rows, list(taken.events)
        targets = int(rows.targets_per_row().sum())
        factor = self._schedule.factor(step) * self.method.rate_factor(step)
        rates = Rates(self._settings.learning_rate * factor, self._settings.dense_rate * factor)
        results = self._passes(step, rates, rows, targets)
        chosen = self.method.choose(step, results)
        # The one read of the device per update: nothing is written before loss and norm are known to be finite.
        loss, norm = torch.stack([results[-1].loss, kept_norm(chosen.values()).to(results[-1].loss.device)]).tolist()
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if skipped:
            if self._settings.on_nonfinite == "stop":
                raise self._diverged(step, loss, norm, rates)
            events.append({"kind": "skip", "loss": repr(loss), "gradient_norm": repr(norm)})
        else:
            if self._settings.clip > 0:
                scale_to(chosen.values(), norm, self._settings.clip)
            count = step % self._settings.log_every == 0
            events += self.method.update(step, rates, chosen, loss, count_unchanged=count)
        self._probe.mark("update", sum(tensor.untyped_storage().nbytes() for tensor in chosen.values()))
        return StepReport(
            step=step,
            loss=loss,
            gradient_norm=norm,
            rates=rates,
            targets=targets,
            slots=rows.slots,
            skipped=skipped,
            unchanged=None if skipped else self.method.unchanged,
            events=events,
            labels=rows.labels,
            seconds=time.perf_counter() - started,
        )

    def _passes(self, step: int, rates: Rates, rows: Rows, targets: int) -> list[PassResult]:
        def refuse_nonfinite(nll: float) -> None:
            if not math.isfinite(nll):
                raise self._diverged(step, nll / targets, "not taken", rates)

        return run_passes(
            self.method,
            self.model,
            step,
            rates,
            lambda: self._batches(rows),
            targets=targets,
            scale=1.0 / targets,
            before_write=refuse_nonfinite,
            after_backward=lambda routes: self._probe.mark(
                "backward", sum(route.held_bytes() for route in routes.values())
            ),
        )

    def _batches(self, rows: Rows) -> Iterator[Batch]:
        for part in micro_batches(rows, self._settings.micro_rows):
            if self._should_stop():
                raise StopRequested
            yield batch_of(part, self._settings.device)

    def _diverged(self, step: int, loss: float, norm: float | str, rates: Rates) -> DivergedError:
        return DivergedError(
            f"update {step}: loss {loss}, gradient norm {norm}; this update changed no weight, and "
            f"what was saved before it is finite. Usual causes: a learning rate that is too high (here "
            f"{rates.body:.3g} for matrices, {rates.dense:.3g} for embedding, head and norms), too short a warm-up, "
            "clipping off, or bf16 where fp32 is needed. Lower schedule.learning_rate, set schedule.clip = 1.0, or set "
            'run.on_nonfinite = "skip"'
        )

    def _advance(self, rows: Rows, targets: int) -> None:
        state = self.state
        state.step += 1
        state.tokens += targets
        state.slots += rows.slots
        state.rows_digest = rows_digest(state.rows_digest, rows)
        state.unigram_counts += np.bincount(rows.target_ids(), minlength=len(state.unigram_counts))
        state.data = self._stream.state()
