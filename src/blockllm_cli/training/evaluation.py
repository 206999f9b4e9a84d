"""Perplexity on a fixed set of rows, token-weighted, and its biased form from the literature.

`eval/perplexity` is exp(sum of negative log likelihood / number of target tokens): token losses in fp32, summed in
float64, so that it does not depend on how the rows are cut into batches. `eval/perplexity_legacy` is what the shared
evaluation loop of the GaLore family reports: the mean of batch means, times N / (N + 1), since its batch counter starts
at one (jiaweizzhao/GaLore, evaluate_model).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from blockllm_cli.data.batches import batch_of, micro_batches
from blockllm_cli.data.rows import Rows
from blockllm_cli.data.stopping import Progress, unheard
from blockllm_cli.errors import StopRequested
from blockllm_cli.model.llama import LlamaForCausalLM
from blockllm_cli.recipe.sections import Recipe

# Batch rows and ranks with which each size was evaluated in the papers (GaLore scripts).
PAPER_BATCHES = {"60m": (256, 1), "130m": (256, 1), "350m": (128, 4), "1b": (16, 8), "7b": (8, 64)}


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a model on a fixed set of rows.

    Attributes:
        nll: sum of negative log likelihood over all targets, nats.
        targets: number of target tokens.
        loss: nll / targets.
        perplexity: exp(loss), infinite where that overflows.
        perplexity_legacy: the literature's biased value, see the module docstring.
    """

    nll: float
    targets: int
    loss: float
    perplexity: float
    perplexity_legacy: float


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models on `rows`.

    Attributes:
        rows: the validation set.
        batch_rows: rows per forward pass; a matter of memory, not of numbers.
        legacy_rows: rows per batch and rank of the legacy value.
        legacy_ranks: ranks of the legacy value.
        device: where the model is.
    """

    rows: Rows
    batch_rows: int
    legacy_rows: int
    legacy_ranks: int
    device: torch.device

    def evaluate(
        self, model: LlamaForCausalLM, should_stop: Callable[[], bool], progress: Progress = unheard
    ) -> Evaluation:
        """Run `model` forward over all rows; nothing of the model, of gradients or of any generator changes.

        Args:
            model: on `device`.
            should_stop: asked before each batch.
            progress: told how many of the rows are done.

        Raises:
            StopRequested: `should_stop` became true between two batches.
        """
        nll_parts: list[NDArray[np.float64]] = []
        done = 0
        with torch.inference_mode():
            for part in micro_batches(self.rows, self.batch_rows):
                if should_stop():
                    raise StopRequested
                nll, _ = model.row_nll(batch_of(part, self.device))
                nll_parts.append(nll.cpu().numpy())
                done += len(part)
                progress(done, len(self.rows))
        row_nll = np.concatenate(nll_parts)
        row_targets = self.rows.targets_per_row()
        total, targets = float(row_nll.sum()), int(row_targets.sum())
        legacy = legacy_loss(row_nll, row_targets, self.legacy_rows, self.legacy_ranks)
        return Evaluation(
            nll=total,
            targets=targets,
            loss=total / targets,
            perplexity=perplexity_of(total / targets),
            perplexity_legacy=perplexity_of(legacy),
        )


def evaluator_for(recipe: Recipe, rows: Rows, device: torch.device) -> Evaluator:
    """The evaluator a recipe asks for; the legacy value's batch is the papers' where the model has a paper's size."""
    evaluate = recipe.evaluate
    legacy_rows, legacy_ranks = PAPER_BATCHES.get(recipe.model.size or "", (evaluate.rows, 1))
    return Evaluator(
        rows=rows,
        batch_rows=evaluate.rows,
        legacy_rows=evaluate.legacy_rows or legacy_rows,
        legacy_ranks=evaluate.legacy_ranks or legacy_ranks,
        device=device,
    )


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def legacy_loss(row_nll: NDArray[np.float64], row_targets: NDArray[np.int64], batch_rows: int, ranks: int = 1) -> float:
    """Mean over batches of the mean token loss of each, times N / (N + 1).

    Args:
        row_nll: summed loss of each row, nats, (R,).
        row_targets: target tokens of each row, (R,).
        batch_rows: rows per batch on one rank; the last batch may be shorter and weighs as much as the others.
        ranks: N, the batches counted by one rank, is ceil(R / (batch_rows * ranks)).
    """
    starts = np.arange(0, len(row_nll), batch_rows)
    means = np.add.reduceat(row_nll, starts) / np.maximum(np.add.reduceat(row_targets, starts), 1)
    count = math.ceil(len(row_nll) / (batch_rows * ranks))
    return float(means.mean()) * count / (count + 1)


def unigram_perplexity(train_counts: NDArray[np.int64], validation_counts: NDArray[np.int64]) -> float:
    """Perplexity of add-one unigram frequencies on the validation targets: what counting words alone achieves.

    Args:
        train_counts: how often each id was a training target so far, (V,).
        validation_counts: how often each id is a validation target, (V,).
    """
    probabilities = (train_counts + 1) / (train_counts.sum() + len(train_counts))
    return perplexity_of(float(-(validation_counts * np.log(probabilities)).sum() / validation_counts.sum()))
