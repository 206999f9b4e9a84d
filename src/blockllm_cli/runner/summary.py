"""summary.json: what a run came to, in one table with stable names."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from blockllm_cli import metrics
from blockllm_cli.memory.measure import MemoryMeter, device_peaks, process_memory
from blockllm_cli.memory.plan import Plan
from blockllm_cli.methods.base import Method
from blockllm_cli.methods.resolve import Resolved
from blockllm_cli.recipe.dump import recipe_sha256
from blockllm_cli.runner.initial import read_record
from blockllm_cli.runner.inputs import Inputs
from blockllm_cli.runner.loop import Loop
from blockllm_cli.runner.machine import Machine, versions
from blockllm_cli.tracking.run_folder import RunFolder


@dataclass(frozen=True)
class Outcome:
    """How a process's share of a run ended.

    Attributes:
        status: completed, stopped, failed or diverged.
        exit_code: of the process.
        message: one sentence.
        loop: None when it never began.
        unmoved: trained parameters that are as the run began; None unless the run came to an end of its own.
    """

    status: str
    exit_code: int
    message: str
    resolved: Resolved
    machine: Machine
    inputs: Inputs
    method: Method
    plan: Plan
    loop: Loop | None
    unmoved: list[str] | None = None


def write_summary(folder: RunFolder, outcome: Outcome) -> None:
    """Write summary.json.

    Raises:
        StorageError: the disk refuses.
    """
    folder.write_summary(
        _identity(folder, outcome) | _numbers(outcome) | _memory(outcome) | _provenance(folder, outcome)
    )


def _identity(folder: RunFolder, outcome: Outcome) -> dict[str, Any]:
    recipe = outcome.resolved.recipe
    return {
        "status": outcome.status,
        "exit_code": outcome.exit_code,
        "message": outcome.message,
        "run_id": folder.run_id,
        "name": recipe.run.name,
        "method": recipe.method["name"],
        "variant": recipe.method.get("variant"),
    }


def _numbers(outcome: Outcome) -> dict[str, Any]:
    loop = outcome.loop
    state = loop.trainer.state if loop else None
    observed = loop.observed if loop else None
    evaluation = observed.evaluation if observed else {}
    seconds = loop.step_seconds if loop else []
    return {
        "steps": state.step if state else 0,
        "tokens": state.tokens if state else 0,
        "slots": state.slots if state else 0,
        "loss": evaluation.get(metrics.EVAL_LOSS),
        "train_loss": observed.train_loss if observed else None,
        "perplexity": evaluation.get(metrics.PERPLEXITY),
        "perplexity_legacy": evaluation.get(metrics.PERPLEXITY_LEGACY),
        "unigram_perplexity": evaluation.get(metrics.UNIGRAM_PERPLEXITY),
        "best_perplexity": observed.best_perplexity if observed else None,
        "best_step": observed.best_step if observed else None,
        "skipped_updates": observed.skipped if observed else 0,
        "tokens_per_second": loop.process_targets / sum(seconds) if loop and seconds else None,
        "compilations": loop.compilations if loop else None,
        "step_seconds_median": statistics.median(seconds) if seconds else None,
    }


def _memory(outcome: Outcome) -> dict[str, Any]:
    loop = outcome.loop
    nothing: dict[str, int | None] = dict.fromkeys(outcome.plan.by_category())
    meter: MemoryMeter | None = loop.meter if loop else None
    return {
        "memory": meter.by_category() if meter else nothing,
        "planned_memory": outcome.plan.by_category(),
        "paper_memory": nothing,
        "peak_tensor_bytes": None,
        "peak_phase": None,
        "peak_rss_bytes": process_memory()["peak_rss_bytes"],
        **device_peaks(outcome.machine.device),
        "parameters": outcome.inputs.config.num_parameters,
        "state_entries": outcome.method.state_entries if loop else None,
        "trainable_entries": outcome.method.trainable_entries if loop else None,
        "unmoved": outcome.unmoved,
    }


def _provenance(folder: RunFolder, outcome: Outcome) -> dict[str, Any]:
    recipe, loop = outcome.resolved.recipe, outcome.loop
    initial = read_record(folder)
    return {
        "recipe_sha256": recipe_sha256(recipe),
        "train_rows_sha256": loop.trainer.state.rows_digest.hex() if loop else None,
        "validation_sha256": outcome.inputs.validation_sha256,
        "tokenizer_sha256": outcome.inputs.tokenizer.sha256,
        "init": {key: initial[key] for key in ("name", "files")} if initial else None,
        "versions": versions(),
        "device": str(outcome.machine.device),
        "seed": recipe.run.seed,
    }
