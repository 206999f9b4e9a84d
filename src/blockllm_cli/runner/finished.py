"""Reads a run folder back: its model at a checkpoint, for evaluation and generation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from blockllm_cli.data.tokenizer import AnyTokenizer, load_tokenizer
from blockllm_cli.errors import InputError, InterruptedRunError, RecipeError, StopRequested
from blockllm_cli.methods.resolve import Resolved, resolve_recipe
from blockllm_cli.model.config import llama_config
from blockllm_cli.model.generation import generate
from blockllm_cli.model.llama import LlamaForCausalLM, build_model
from blockllm_cli.model.weights import load_weights
from blockllm_cli.runner.inputs import prepare_inputs
from blockllm_cli.runner.machine import choose_machine, choose_precision, on_machine
from blockllm_cli.runner.watchdog import Watchdog
from blockllm_cli.tracking.run_folder import RECIPE, TOKENIZER, RunFolder
from blockllm_cli.tracking.terminal import Terminal
from blockllm_cli.training.checkpoint import Checkpoint, find_checkpoint, open_checkpoint, steps_on_disk
from blockllm_cli.training.evaluation import Evaluation, evaluator_for
from blockllm_cli.training.signals import StopFlag

_MAY_CHANGE = ("evaluate.", "data.", "run.device", "run.threads", "run.deterministic")


@dataclass(frozen=True)
class OpenedRun:
    """A run on disk, ready for forward passes.

    Attributes:
        folder: where it is.
        resolved: its recipe, with the overrides of this call.
        checkpoint: the one whose weights are loaded.
        tokenizer: of the run.
        model: in the run's weight dtype, in evaluation use only.
        device: where the model is.
    """

    folder: RunFolder
    resolved: Resolved
    checkpoint: Checkpoint
    tokenizer: AnyTokenizer
    model: LlamaForCausalLM
    device: torch.device


@contextlib.contextmanager
def opened_run(path: Path, *, step: int | None, overrides: Sequence[str] = ()) -> Iterator[OpenedRun]:
    """Load the model of the run at `path`.

    Args:
        path: run folder.
        step: which checkpoint; None for the newest.
        overrides: `table.key=value` texts on top of the run's recipe.

    Raises:
        InputError: no such run or checkpoint, or it is damaged.
    """
    folder = RunFolder.existing(path)
    _check_overrides(overrides)
    resolved = resolve_recipe(folder.path / RECIPE, overrides=overrides)
    machine = choose_machine(resolved.loaded)
    checkpoint = _checkpoint(folder, step)
    tokenizer = load_tokenizer(folder.path / TOKENIZER)
    recipe = resolved.recipe
    with on_machine(machine):
        model = build_model(
            llama_config(recipe.model, tokenizer_vocab_size=tokenizer.vocab_size),
            seed=0,
            dtype=choose_precision(recipe.run.precision, recipe.run.rounding, machine.device)[0].weights,
            device=machine.device,
        )
        load_weights(model, checkpoint.weights())
        yield OpenedRun(folder, resolved, checkpoint, tokenizer, model, machine.device)


def _check_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not key.startswith(_MAY_CHANGE):
            raise RecipeError(
                f"--set {override}: {key} belongs to the run that was trained; an evaluation may change "
                f"{', '.join(each + '*' if each.endswith('.') else each for each in _MAY_CHANGE)}"
            )


def _checkpoint(folder: RunFolder, step: int | None) -> Checkpoint:
    if step is not None:
        path = folder.checkpoints / f"step-{step:08d}"
        if not path.is_dir():
            there = ", ".join(str(int(each.name.removeprefix("step-"))) for each in steps_on_disk(folder.checkpoints))
            raise InputError(f"{folder.path} has no checkpoint of update {step}; it has {there or 'none'}")
        return open_checkpoint(path)
    checkpoint = find_checkpoint(folder.checkpoints, fall_back=False)
    if checkpoint is None:
        raise InputError(f"{folder.path} has no checkpoint yet")
    return checkpoint


def evaluate_run(
    path: Path, *, step: int | None, overrides: Sequence[str], terminal: Terminal
) -> tuple[OpenedRun, Evaluation, str]:
    """Perplexity of a run on its validation set, or on another that `overrides` name.

    Returns:
        The run, the figures, and the hash of the validation rows.

    Raises:
        BlockLLMError: the run or the data cannot be used.
        InterruptedRunError: a signal stopped it.
    """
    with StopFlag(terminal) as stop, contextlib.ExitStack() as stack:
        with terminal.progress("loading the model"):
            run = stack.enter_context(opened_run(path, step=step, overrides=overrides))
        try:
            return _evaluate(run, terminal, stop)
        except StopRequested as error:
            assert stop.signal_number is not None
            raise InterruptedRunError("stopped; nothing was written", stop.signal_number) from error


def _evaluate(run: OpenedRun, terminal: Terminal, should_stop: Callable[[], bool]) -> tuple[OpenedRun, Evaluation, str]:
    watchdog = Watchdog(should_stop, terminal.say, run.resolved.recipe.data.retry_seconds)
    inputs = prepare_inputs(run.resolved, run.folder, terminal, watchdog)
    evaluator = evaluator_for(run.resolved.recipe, inputs.validation, run.device)
    with terminal.progress("evaluating", total=len(evaluator.rows), unit="rows") as step:
        evaluation = evaluator.evaluate(run.model, should_stop, step.update)
    return run, evaluation, inputs.validation_sha256


def generate_text(
    run: OpenedRun, prompt: str, *, max_new_tokens: int, temperature: float, top_k: int | None, seed: int
) -> str:
    """`prompt` continued by the run's model; it begins as the rows of training did, with a mark or without one."""
    ids = run.tokenizer.encode([prompt])[0].tolist()
    opening = [run.tokenizer.bos_id] if run.resolved.recipe.data.layout == "pack" or not ids else []
    generator = torch.Generator(device=run.device).manual_seed(seed)
    made = generate(
        run.model,
        [*opening, *ids],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        generator=generator,
        stop_id=run.tokenizer.eos_id,
    )
    return run.tokenizer.decode([*ids, *made])
