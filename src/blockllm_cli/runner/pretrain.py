"""`blockllm pretrain`, assembled: where it starts, what it builds, how it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blockllm_cli.data.stream import RowStream
from blockllm_cli.durable import sweep, write_bytes, write_json, write_text
from blockllm_cli.errors import BlockLLMError, InputError, InterruptedRunError, RecipeError, StopRequested
from blockllm_cli.memory.measure import MemoryMeter
from blockllm_cli.memory.plan import Plan, plan_run
from blockllm_cli.methods.base import Method
from blockllm_cli.methods.resolve import Resolved, resolve_recipe
from blockllm_cli.model.compiled import LayerCompiler, check_compiler
from blockllm_cli.model.llama import LlamaForCausalLM
from blockllm_cli.model.weights import load_weights
from blockllm_cli.optim.triton_adam import why_no_triton
from blockllm_cli.recipe.dump import dump_recipe
from blockllm_cli.recipe.load import load_recipe
from blockllm_cli.recipe.steps import total_steps, warmup_steps
from blockllm_cli.runner.initial import InitialModel, begin, open_initial, still_initial, write_record
from blockllm_cli.runner.inputs import Inputs, prepare_inputs
from blockllm_cli.runner.loop import Loop, Observed
from blockllm_cli.runner.machine import (
    Machine,
    choose_machine,
    choose_precision,
    describe_environment,
    note_environment,
    on_machine,
)
from blockllm_cli.runner.resume import LATEST_GOOD, check_comparable, folder_to_resume
from blockllm_cli.runner.summary import Outcome, write_summary
from blockllm_cli.runner.watchdog import Watchdog
from blockllm_cli.tracking.run_folder import ENVIRONMENT, PLAN, RECIPE, TOKENIZER, RunFolder
from blockllm_cli.tracking.terminal import Terminal
from blockllm_cli.tracking.wandb_process import Tracker, run_tracker
from blockllm_cli.training.checkpoint import Checkpoint, find_checkpoint, set_aside, step_of, steps_on_disk
from blockllm_cli.training.evaluation import evaluator_for
from blockllm_cli.training.random_state import restore_random_state, seed_random_state
from blockllm_cli.training.schedule import Schedule
from blockllm_cli.training.signals import StopFlag
from blockllm_cli.training.trainer import Trainer, TrainerSettings, TrainState


@dataclass(frozen=True)
class PretrainRequest:
    """What the command line asks for.

    Attributes:
        recipe: file or name of a shipped recipe; may be None when `resume` is the folder of a run.
        overrides: `table.key=value` texts, later ones win.
        method: `NAME[:key=value,...]`, replaces the [method] table.
        resume: `latest`, `latest-good` or the folder of a run.
        stop_after: save and stop after this update.
    """

    recipe: str | None
    overrides: Sequence[str] = ()
    method: str | None = None
    resume: str | None = None
    stop_after: int | None = None


def pretrain(request: PretrainRequest, terminal: Terminal) -> Path:
    """Run or resume what `request` says and return the run folder.

    Raises:
        BlockLLMError: every expected failure, each with its exit code.
    """
    resolved, folder = _open(request)
    if folder is not None:
        saved = load_recipe(folder.path / RECIPE).recipe
        for note in check_comparable(saved, resolved.recipe, folder.path):
            terminal.say(f"note: {note}")
        resolved = resolved.with_precision(saved.run.precision)
        summary = folder.summary()
        if summary is not None and summary["status"] == "completed":
            terminal.say(f"this run is complete: {summary['steps']} updates, perplexity {summary['perplexity']}")
            return folder.path
    _check_stop_after(request, resolved)
    machine = choose_machine(resolved.loaded)
    with StopFlag(terminal) as stop, on_machine(machine), contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(folder.locked())
        watchdog = Watchdog(stop, terminal.say, resolved.recipe.data.retry_seconds)
        if resolved.recipe.run.compile == "layer":
            with terminal.progress("trying the compiler"):
                check_compiler(machine.device)
        try:
            inputs = prepare_inputs(resolved, folder, terminal, watchdog)
            is_new = folder is None or not steps_on_disk(folder.checkpoints)
            initial = open_initial(resolved, inputs, folder, terminal, watchdog) if is_new else None
        except StopRequested as error:
            raise _interrupted_early(stop, folder) from error
        return _Run(request, resolved, machine, inputs, initial, terminal, stop, watchdog).carry_out(folder, stack)


def _open(request: PretrainRequest) -> tuple[Resolved, RunFolder | None]:
    resolved = None
    if request.recipe is not None:
        resolved = resolve_recipe(request.recipe, overrides=request.overrides, method=request.method)
    if request.resume is None:
        if resolved is None:
            raise RecipeError("name a recipe: a file, or one of `blockllm recipes list`")
        return resolved, None
    folder = folder_to_resume(request.resume, resolved.loaded if resolved else None)
    if resolved is None:
        resolved = resolve_recipe(folder.path / RECIPE, overrides=request.overrides, method=request.method)
    return resolved, folder


def _check_stop_after(request: PretrainRequest, resolved: Resolved) -> None:
    if request.stop_after is not None and not 0 < request.stop_after <= total_steps(resolved.recipe):
        raise RecipeError(f"--stop-after {request.stop_after}: the run has updates 1 to {total_steps(resolved.recipe)}")


def _interrupted_early(stop: StopFlag, folder: RunFolder | None) -> InterruptedRunError:
    """A stop while inputs were prepared: no run folder has been made, that of a resumed run is as it was."""
    assert stop.signal_number is not None
    if folder is None:
        words = "stopped before the first update; nothing was written; run the same command again"
    else:
        words = f"stopped before the run went on; its folder is as it was; continue with: {folder.resume_command}"
    return InterruptedRunError(words, stop.signal_number)


class _Run:
    """One process's share of a run, from prepared inputs to the summary."""

    def __init__(
        self,
        request: PretrainRequest,
        resolved: Resolved,
        machine: Machine,
        inputs: Inputs,
        initial: InitialModel | None,
        terminal: Terminal,
        stop: StopFlag,
        watchdog: Watchdog,
    ) -> None:
        self.request = request
        self.machine = machine
        self.inputs = inputs
        self.initial = initial
        self.terminal = terminal
        self.stop = stop
        self.watchdog = watchdog
        recipe = resolved.recipe
        self.precision, note = choose_precision(recipe.run.precision, recipe.run.rounding, machine.device)
        if note:
            terminal.say(note)
        if machine.device.type == "cuda" and (reason := why_no_triton(machine.device)) is not None:
            terminal.say(f"note: torch's kernels make the updates, in more passes than one: {reason}")
        self.resolved = resolved.with_precision(self.precision.name, note)
        self.recipe = self.resolved.recipe
        self.method: Method = self.resolved.method(self.precision)
        try:
            self.plan: Plan = plan_run(inputs.config.parameter_shapes(), self.method, self.precision)
        except RecipeError as error:
            raise self.resolved.placed(error) from error

    def carry_out(self, folder: RunFolder | None, stack: contextlib.ExitStack) -> Path:
        """Build, train, and leave a summary whatever happens."""
        resumed = folder is not None
        if folder is None:
            folder = RunFolder.create(Path(self.recipe.run.output), self.recipe.run.name)
            stack.enter_context(folder.locked())
            self._write_start(folder)
        checkpoint = None
        if resumed:
            with self.terminal.progress("reading the checkpoint"):
                checkpoint = find_checkpoint(folder.checkpoints, fall_back=self.request.resume == LATEST_GOOD)
            self._check_inputs(folder, checkpoint)
            if self._is_there_already(checkpoint):
                self.terminal.say(f"--stop-after {self.request.stop_after}: the run is there already")
                return folder.path
        self.terminal.log_to(folder.open_log())
        self.terminal.say(f"run folder: {folder.path}")
        if resumed:
            self.terminal.say(
                f"resuming at update {checkpoint.step}" if checkpoint else "no checkpoint yet: starting at update 0"
            )
        loop: Loop | None = None
        try:
            with self._stream(checkpoint) as stream:
                # All that can refuse a resume comes before the first change to the folder.
                with self.terminal.progress("building the model"):
                    trainer = self._trainer(checkpoint, stream)
                if self.initial is not None:
                    write_record(folder, self.initial)
                if resumed:
                    self._continue(folder, checkpoint)
                # It ends with the stack: after the summary, before the folder's lock.
                tracker = stack.enter_context(
                    run_tracker(
                        folder,
                        self.recipe.run.name,
                        self.recipe.tracking,
                        say=self.terminal.say,
                        warn=self.terminal.warn,
                    )
                )
                loop = self._loop(folder, checkpoint, stream, trainer, tracker)
                loop.run()
        except BaseException as error:
            if loop is not None or not resumed:
                self._write_failure(folder, loop, error)
            raise
        return self._finish(folder, loop)

    def _check_inputs(self, folder: RunFolder, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            return
        now = {
            "validation_sha256": self.inputs.validation_sha256,
            "tokenizer_sha256": self.inputs.tokenizer.sha256,
        }
        for key, value in now.items():
            if checkpoint.state[key] != value:
                what = "validation rows are" if key == "validation_sha256" else "tokenizer is"
                raise InputError(
                    f"cannot resume {folder.path}: the {what} not what the run began with ({key} was "
                    f"{checkpoint.state[key][:12]}..., is {value[:12]}...); put the files back, or start a new run"
                )

    def _is_there_already(self, checkpoint: Checkpoint | None) -> bool:
        wanted, done = self.request.stop_after, checkpoint.step if checkpoint else 0
        if wanted is not None and wanted < done:
            raise RecipeError(f"--stop-after {wanted}: the run is at update {done} already")
        return wanted is not None and wanted == done and wanted < total_steps(self.recipe)

    def _continue(self, folder: RunFolder, checkpoint: Checkpoint | None) -> None:
        """Take out of the folder what lies past the checkpoint that the run goes on from."""
        step = checkpoint.step if checkpoint else -1
        pending = checkpoint is not None and checkpoint.state["observed"]["pending_row"] is not None
        set_aside(folder.checkpoints, [path for path in steps_on_disk(folder.checkpoints) if step_of(path) > step])
        for place in (folder.path, folder.checkpoints):
            sweep(place)
        folder.cut(step, row_pending=pending)
        for line in note_environment(folder.path / ENVIRONMENT, describe_environment(self.machine)):
            self.terminal.say(f"note: {line}")

    def _write_start(self, folder: RunFolder) -> None:
        write_bytes(folder.path / TOKENIZER, self.inputs.tokenizer.model_bytes)
        write_json(folder.path / ENVIRONMENT, describe_environment(self.machine))
        write_json(folder.path / PLAN, self.plan.to_json())
        # The recipe comes last: a folder with a recipe is a run that can be resumed.
        write_text(folder.path / RECIPE, dump_recipe(self.recipe, self.resolved.comments))

    @contextlib.contextmanager
    def _stream(self, checkpoint: Checkpoint | None) -> Iterator[RowStream]:
        stream = RowStream(
            self.inputs.train,
            self.inputs.tokenizer,
            settings=self.inputs.settings,
            state=checkpoint.state["data"] if checkpoint else None,
            should_stop=self.watchdog,
            prepared=self.inputs.prepared,
        )
        try:
            yield stream
        finally:
            stream.close()

    def _trainer(self, checkpoint: Checkpoint | None, stream: RowStream) -> Trainer:
        model = self._model(checkpoint)
        self.method.prepare(model)
        self.compiler: LayerCompiler | None = model.compile_layers() if self.recipe.run.compile == "layer" else None
        state = self._train_state(checkpoint, stream)
        if checkpoint is not None:
            self.method.load_state_dict(checkpoint.method())
            restore_random_state(checkpoint.state["random"])
        else:
            seed_random_state(self.resolved.method_seed)
        self.meter = MemoryMeter(
            model,
            self.method,
            self.plan,
            step=state.step,
            peaks=checkpoint.state["memory_peaks"] if checkpoint else None,
        )
        schedule = self.recipe.schedule
        assert schedule.learning_rate is not None  # filled when the recipe was resolved
        settings = TrainerSettings(
            steps=total_steps(self.recipe),
            rows=self.recipe.batch.rows,
            micro_rows=self.recipe.batch.rows // self.resolved.micro_batches,
            learning_rate=schedule.learning_rate,
            dense_rate=schedule.learning_rate if schedule.dense_rate is None else schedule.dense_rate,
            clip=schedule.clip or 0.0,
            on_nonfinite=self.recipe.run.on_nonfinite,
            log_every=self.recipe.tracking.log_every,
            device=self.machine.device,
        )
        factor = Schedule(schedule.shape, settings.steps, warmup_steps(self.recipe), schedule.min_ratio)
        return Trainer(model, self.method, factor, stream, settings, state, probe=self.meter, should_stop=self.stop)

    def _loop(
        self,
        folder: RunFolder,
        checkpoint: Checkpoint | None,
        stream: RowStream,
        trainer: Trainer,
        tracker: Tracker,
    ) -> Loop:
        return Loop(
            trainer=trainer,
            evaluator=evaluator_for(self.recipe, self.inputs.validation, self.machine.device),
            stream=stream,
            meter=self.meter,
            folder=folder,
            terminal=self.terminal,
            recipe=self.recipe,
            stop=self.stop,
            watchdog=self.watchdog,
            stop_after=self.request.stop_after,
            observed=Observed.restore(checkpoint.state["observed"]) if checkpoint else Observed(),
            inputs=self.inputs,
            tracker=tracker,
            compiler=self.compiler,
        )

    def _model(self, checkpoint: Checkpoint | None) -> LlamaForCausalLM:
        model = begin(self.resolved, self.inputs, self.initial, self.precision, self.machine.device)
        if checkpoint is not None:
            load_weights(model, checkpoint.weights())
        return model

    def _train_state(self, checkpoint: Checkpoint | None, stream: RowStream) -> TrainState:
        if checkpoint is None:
            counts = np.zeros(self.inputs.config.vocab_size, dtype=np.int64)
            return TrainState(0, 0, 0, b"", counts, stream.state())
        saved = checkpoint.state
        return TrainState(
            step=checkpoint.step,
            tokens=saved["tokens"],
            slots=saved["slots"],
            rows_digest=bytes.fromhex(saved["rows_digest"]),
            unigram_counts=np.array(saved["unigram_counts"], dtype=np.int64),
            data=saved["data"],
        )

    def _finish(self, folder: RunFolder, loop: Loop) -> Path:
        status = "stopped" if loop.stopped_early else "completed"
        message = f"stopped after update {loop.step}, as asked" if loop.stopped_early else "completed"
        model = loop.trainer.model
        trained = [name for name, _ in model.named_parameters() if self.method.trains(name)]
        unmoved = still_initial(model, trained, self.resolved, folder)
        write_summary(folder, self._outcome(status, 0, message, loop, unmoved))
        if unmoved:
            self.terminal.say(f"note: {_unmoved_note(unmoved, self.method)}")
        if loop.stopped_early:
            self.terminal.say(f"saved at update {loop.step}; continue with: {folder.resume_command}")
        return folder.path

    def _write_failure(self, folder: RunFolder, loop: Loop | None, error: BaseException) -> None:
        if isinstance(error, InterruptedRunError):
            status, code = "stopped", error.status
        elif isinstance(error, BlockLLMError):
            status, code = ("diverged" if error.exit_code == 5 else "failed"), int(error.exit_code)
        else:
            status, code = "failed", 1
        # The disk may be what failed: then the first error is the one to show.
        with contextlib.suppress(BlockLLMError):
            write_summary(folder, self._outcome(status, code, str(error) or type(error).__name__, loop))

    def _outcome(
        self, status: str, code: int, message: str, loop: Loop | None, unmoved: list[str] | None = None
    ) -> Outcome:
        return Outcome(
            status=status,
            exit_code=code,
            message=message,
            resolved=self.resolved,
            machine=self.machine,
            inputs=self.inputs,
            method=self.method,
            plan=self.plan,
            loop=loop,
            unmoved=unmoved,
        )


def _unmoved_note(unmoved: Sequence[str], method: Method) -> str:
    """What log and terminal say of trained parameters that are as the run began."""
    first = ", ".join(unmoved[:3]) + (", ..." if len(unmoved) > 3 else "")
    return (
        f"{len(unmoved)} of the tensors that {method.name} trains still have the values they began with: {first} "
        "(`unmoved` in summary.json lists them)"
    )
