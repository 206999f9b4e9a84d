"""Between the trainer and the disk: which update is logged, evaluated, saved, and where a run stops."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from blockllm_cli import metrics
from blockllm_cli.data.stream import RowStream
from blockllm_cli.errors import DivergedError, InputError, InterruptedRunError, StopRequested, StorageError
from blockllm_cli.memory.measure import MemoryMeter, process_memory
from blockllm_cli.model.compiled import LayerCompiler
from blockllm_cli.recipe.sections import Recipe
from blockllm_cli.recipe.steps import total_steps
from blockllm_cli.runner.compilation_notes import CompilationNotes
from blockllm_cli.runner.data_wait import DataWait
from blockllm_cli.runner.inputs import Inputs
from blockllm_cli.runner.watchdog import Watchdog
from blockllm_cli.tracking.run_folder import EVENTS, METRICS, ROWS, JsonLines, RunFolder
from blockllm_cli.tracking.terminal import Terminal
from blockllm_cli.tracking.wandb_process import Tracker
from blockllm_cli.training.checkpoint import save_checkpoint
from blockllm_cli.training.evaluation import Evaluation, Evaluator, unigram_perplexity
from blockllm_cli.training.random_state import random_state
from blockllm_cli.training.signals import StopFlag
from blockllm_cli.training.trainer import StepReport, Trainer


@dataclass
class Observed:
    """What the loop has seen and a resumed run must still know, plain values only.

    Attributes:
        best_perplexity: lowest validation perplexity so far.
        best_step: when that was.
        skipped: updates skipped for a non-finite value.
        train_loss: loss of the newest update.
        evaluation: figures of the newest evaluation, as in metrics.jsonl.
        evaluated_step: when that was.
        newest_row: training figures of the newest update, logged or not.
        has_begun: whether what comes before the first update was done, or stands in `pending_row`.
        pending_row: a row whose evaluation a stop cut short; the resumed run evaluates and writes it first.
    """

    best_perplexity: float | None = None
    best_step: int | None = None
    skipped: int = 0
    train_loss: float | None = None
    evaluation: metrics.Row = field(default_factory=dict)
    evaluated_step: int | None = None
    newest_row: metrics.Row = field(default_factory=dict)
    has_begun: bool = False
    pending_row: metrics.Row | None = None

    @classmethod
    def restore(cls, saved: dict[str, Any]) -> Observed:
        """From a checkpoint's plain values."""
        return cls(**saved)


@dataclass
class _Window:
    """Figures since the last logged row, for the throughput of this process."""

    targets: int = 0
    slots: int = 0
    seconds: float = 0.0
    updates: int = 0


class Loop:
    """Drives one trainer and writes what it reports. `run` returns, or raises what ended it."""

    def __init__(
        self,
        *,
        trainer: Trainer,
        evaluator: Evaluator,
        stream: RowStream,
        meter: MemoryMeter,
        folder: RunFolder,
        terminal: Terminal,
        recipe: Recipe,
        stop: StopFlag,
        watchdog: Watchdog,
        stop_after: int | None,
        observed: Observed,
        inputs: Inputs,
        tracker: Tracker,
        compiler: LayerCompiler | None,
    ) -> None:
        self.trainer = trainer
        self.evaluator = evaluator
        self.meter = meter
        self.observed = observed
        self.stopped_early = False
        self.step_seconds: list[float] = []
        self.process_targets = 0
        self._stream = stream
        self._folder = folder
        self._terminal = terminal
        self._recipe = recipe
        self._stop = stop
        self._watchdog = watchdog
        self._stop_after = stop_after
        self._inputs = inputs
        self._tracker = tracker
        self._compilations = CompilationNotes(compiler) if compiler is not None else None
        self._steps = total_steps(recipe)
        self._started = time.perf_counter()
        self._window = _Window()
        self._data_wait = DataWait(recipe.data.workers)
        self._metrics = JsonLines(folder.path / METRICS)
        self._events = JsonLines(folder.path / EVENTS)
        self._rows = JsonLines(folder.path / ROWS) if recipe.tracking.log_rows else None
        self._validation_counts = np.bincount(evaluator.rows.target_ids(), minlength=len(trainer.state.unigram_counts))

    @property
    def compilations(self) -> int | None:
        """Graphs that this process compiled; None where `run.compile` is off."""
        return None if self._compilations is None else self._compilations.count

    @property
    def step(self) -> int:
        """Updates done."""
        return self.trainer.state.step

    def run(self) -> None:
        """Train until the schedule, the data, `--stop-after` or a signal ends it.

        Raises:
            InterruptedRunError: a signal asked for the stop; a checkpoint is on disk.
            BlockLLMError: everything else that ends a run before its time.
        """
        self._terminal.start_live(steps=self._steps, done=self.step)
        try:
            self._begin()
            for report in self._updates():
                self._observe(report)
                if self._is_enough(report):
                    return
            if self.observed.evaluated_step != self.step:
                self._end_late()
            self._check_outcome()
        except StopRequested as error:
            self._save()
            assert self._stop.signal_number is not None
            raise InterruptedRunError(
                f"stopped at update {self.step} and saved; continue with: {self._folder.resume_command}",
                self._stop.signal_number,
            ) from error
        finally:
            self._note_network()
            self._terminal.stop_live()
            for file in (self._metrics, self._events, self._rows):
                if file is not None:
                    file.close()

    def _updates(self) -> Iterator[StepReport]:
        """The trainer's updates. What a caller's body raises does not come by here: its update is not logged yet."""
        try:
            yield from self.trainer.updates()
        except (InputError, StorageError) as error:
            # The data end a run whose state is sound: it was taken before the update that cannot begin. Storage is that
            # of the cache which data are fetched into; it may be full while the run's own disk is not.
            try:
                self._save()
            except StorageError as failure:
                raise type(error)(f"{error}\nand the run is not saved: {failure}") from error
            raise type(error)(
                f"{error}\nsaved at update {self.step}; continue with: {self._folder.resume_command}"
            ) from error

    def _begin(self) -> None:
        if self.observed.pending_row is not None:
            self._evaluate_and_log(self.observed.pending_row)
        elif not self.observed.has_begun:
            self.observed.has_begun = True
            for event in self._inputs.notices:
                self._events.append({"step": 0, **event})
                self._terminal.say(_plain(event) if event["kind"] == "corpus" else f"validation set: {_plain(event)}")
            if self._recipe.evaluate.at_start:
                self._evaluate_and_log(metrics.counter_row(self.trainer.state))

    def _observe(self, report: StepReport) -> None:
        self._count(report)
        self._note_network()
        self._note_compilations(report.step)
        for event in report.events:
            self._events.append({"step": report.step, **event})
            if event["kind"] in ("bad_document", "skip", "exhausted"):
                self._terminal.say(f"update {report.step}: {_plain(event)}")
        if self._rows is not None:
            self._rows.append({"step": report.step, "documents": [list(labels) for labels in report.labels]})
        self._terminal.advance(report.step)
        self._warn_of_rounding(report)
        recipe = self._recipe
        is_logged = report.is_last or report.step % recipe.tracking.log_every == 0
        is_evaluated = report.is_last or (recipe.evaluate.every > 0 and report.step % recipe.evaluate.every == 0)
        if is_logged or is_evaluated:
            row = self.observed.newest_row | self._throughput()
            if is_evaluated:
                self._evaluate_and_log(row)
            else:
                self._log(row)
        every = recipe.checkpoint.every
        if report.is_last or (every > 0 and report.step % every == 0) or report.step == self._stop_after:
            self._save()

    def _note_network(self) -> None:
        for event in self._watchdog.events():
            self._events.append({"step": self.step, **event})

    def _note_compilations(self, step: int) -> None:
        if self._compilations is None:
            return
        for event, words, is_warning in self._compilations.news():
            self._events.append({"step": step, **event})
            (self._terminal.warn if is_warning else self._terminal.say)(f"update {step}: {words}")

    def _end_late(self) -> None:
        """Close a run that was cut after its last update, before it could know that the data had ended."""
        self._metrics.cut(self.step - 1)
        self._evaluate_and_log(self.observed.newest_row)
        for event in self._stream.events_at_end:
            self._events.append({"step": self.step, **event})

    def _check_outcome(self) -> None:
        if self.observed.evaluation and self.observed.evaluation[metrics.EVAL_LOSS] is None:
            raise DivergedError(
                f"the evaluation after update {self.step} is not finite: the weights are of no use; lower "
                "schedule.learning_rate, lengthen schedule.warmup, or set schedule.clip = 1.0"
            )

    def _count(self, report: StepReport) -> None:
        self.observed.newest_row = metrics.counter_row(self.trainer.state) | metrics.train_row(report)
        self.observed.train_loss = self.observed.newest_row[metrics.LOSS]
        self.observed.skipped += report.skipped
        self.step_seconds.append(report.seconds)
        self.process_targets += report.targets
        window = self._window
        window.targets += report.targets
        window.slots += report.slots
        window.seconds += report.seconds
        window.updates += 1

    def _is_enough(self, report: StepReport) -> bool:
        self.stopped_early = report.step == self._stop_after and not report.is_last
        return self.stopped_early

    def _throughput(self) -> metrics.Row:
        window, self._window = self._window, _Window()
        row = metrics.throughput_row(
            targets=window.targets, slots=window.slots, seconds=window.seconds, updates=window.updates
        )
        row[metrics.DATA_WAIT_SECONDS] = self._stream.waited_seconds
        if warning := self._data_wait.look(self._stream.waited_seconds, sum(self.step_seconds)):
            self._terminal.warn(warning)
        return row

    def _evaluate_and_log(self, row: metrics.Row) -> None:
        self.observed.pending_row = row
        started = time.perf_counter()
        words = f"evaluating after update {self.step}"
        with self._terminal.progress(words, total=len(self.evaluator.rows), unit="rows") as step:
            evaluation = self.evaluator.evaluate(self.trainer.model, self._stop, step.update)
        self.observed.pending_row = None
        figures = metrics.evaluation_row(evaluation, self._unigram())
        self._note_best(evaluation)
        self.observed.evaluation = figures
        self.observed.evaluated_step = self.step
        self._log(row | figures | {metrics.EVAL_SECONDS: time.perf_counter() - started})

    def _unigram(self) -> float:
        return unigram_perplexity(self.trainer.state.unigram_counts, self._validation_counts)

    def _note_best(self, evaluation: Evaluation) -> None:
        best = self.observed.best_perplexity
        if not math.isfinite(evaluation.perplexity):
            return
        if best is None or evaluation.perplexity < best:
            self.observed.best_perplexity = evaluation.perplexity
            self.observed.best_step = self.step

    def _log(self, row: metrics.Row) -> None:
        row = row | metrics.memory_row(self.meter.by_category(), process_memory())
        row[metrics.ELAPSED_SECONDS] = time.perf_counter() - self._started
        self._metrics.append(row)
        self._terminal.row(row)
        self._tracker.poll()

    def _warn_of_rounding(self, report: StepReport) -> None:
        if report.unchanged is not None and report.unchanged > 0.5 and report.step == self._recipe.tracking.log_every:
            self._terminal.warn(
                f"rounding to bf16 kept {report.unchanged:.0%} of the written weights as they were at update "
                f'{report.step}; run.precision = "bf16_master" or run.rounding = "stochastic" keeps such small steps'
            )

    def _save(self) -> None:
        """Checkpoint the state after the last finished update; what was logged up to it is made durable first."""
        for file in (self._metrics, self._events, self._rows):
            if file is not None:
                file.sync()
        state, method = self.trainer.state, self.trainer.method
        with self._terminal.progress(f"saving update {state.step}"):
            save_checkpoint(
                self._folder.checkpoints,
                step=state.step,
                weights=dict(self.trainer.model.named_parameters()),
                method_state=method.state_dict(),
                state={
                    "tokens": state.tokens,
                    "slots": state.slots,
                    "rows_digest": state.rows_digest.hex(),
                    "unigram_counts": state.unigram_counts.tolist(),
                    "data": state.data,
                    "observed": asdict(self.observed),
                    "memory_peaks": self.meter.peaks,
                    "random": random_state(),
                    "validation_sha256": self._inputs.validation_sha256,
                    "tokenizer_sha256": self._inputs.tokenizer.sha256,
                },
                keep=self._recipe.checkpoint.keep,
            )


def _plain(event: dict[str, Any]) -> str:
    rest = ", ".join(f"{name} {value}" for name, value in event.items() if name != "kind")
    return f"{event['kind'].replace('_', ' ')}: {rest}"
