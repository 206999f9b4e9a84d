"""Names and units of everything in metrics.jsonl, and the rows made of them.

One row per logged update; evaluation and memory keys stand in the same row. `train/tokens` (targets seen) is the
x-axis. Two runs are equal when all keys agree but those for which `is_about_the_machine` holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from blockllm_cli.training.evaluation import Evaluation
from blockllm_cli.training.trainer import StepReport, TrainState

STEP = "step"
TOKENS = "train/tokens"
SLOTS = "train/slots"
LOSS = "train/loss"
GRADIENT_NORM = "train/gradient_norm"
LEARNING_RATE = "train/learning_rate"
DENSE_RATE = "train/dense_rate"
SKIPPED = "train/skipped"
UNCHANGED = "train/unchanged_fraction"
EVAL_LOSS = "eval/loss"
EVAL_NLL = "eval/nll"
EVAL_TARGETS = "eval/targets"
PERPLEXITY = "eval/perplexity"
PERPLEXITY_LEGACY = "eval/perplexity_legacy"
UNIGRAM_PERPLEXITY = "eval/unigram_perplexity"
TOKENS_PER_SECOND = "throughput/tokens_per_second"
SLOTS_PER_SECOND = "throughput/slots_per_second"
STEP_SECONDS = "time/step_seconds"
ELAPSED_SECONDS = "time/elapsed_seconds"
DATA_WAIT_SECONDS = "time/data_wait_seconds"
EVAL_SECONDS = "time/evaluation_seconds"

Row = dict[str, Any]


def is_about_the_machine(key: str) -> bool:
    """Whether `key` may differ between two equal runs: times, speeds, and what the operating system counts."""
    return key.startswith(("throughput/", "time/")) or (key.startswith("memory/") and "rss" in key)


def counter_row(state: TrainState) -> Row:
    """What every row begins with."""
    return {STEP: state.step, TOKENS: state.tokens, SLOTS: state.slots}


def train_row(report: StepReport) -> Row:
    """Figures of one update; a loss or norm that is not finite is null, since JSON has no word for it."""
    row: Row = {
        LOSS: _finite(report.loss),
        GRADIENT_NORM: _finite(report.gradient_norm),
        LEARNING_RATE: report.rates.body,
        DENSE_RATE: report.rates.dense,
    }
    if report.skipped:
        row[SKIPPED] = True
    if report.unchanged is not None:
        row[UNCHANGED] = report.unchanged
    return row


def evaluation_row(evaluation: Evaluation, unigram: float) -> Row:
    """Figures of one evaluation; an overflowing perplexity is null."""
    return {
        EVAL_LOSS: _finite(evaluation.loss),
        EVAL_NLL: _finite(evaluation.nll),
        EVAL_TARGETS: evaluation.targets,
        PERPLEXITY: _finite(evaluation.perplexity),
        PERPLEXITY_LEGACY: _finite(evaluation.perplexity_legacy),
        UNIGRAM_PERPLEXITY: _finite(unigram),
    }


def memory_row(by_category: Mapping[str, int | None], process: Mapping[str, int]) -> Row:
    """Largest bytes so far per category that is counted, and resident bytes of the process."""
    row: Row = {f"memory/{name}_bytes": count for name, count in by_category.items() if count is not None}
    row.update({f"memory/{name}": count for name, count in process.items()})
    return row


def throughput_row(*, targets: int, slots: int, seconds: float, updates: int) -> Row:
    """Speed over the updates since the last logged row; evaluation and saving are not in `seconds`."""
    if not updates or seconds <= 0:
        return {}
    return {
        TOKENS_PER_SECOND: targets / seconds,
        SLOTS_PER_SECOND: slots / seconds,
        STEP_SECONDS: seconds / updates,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
