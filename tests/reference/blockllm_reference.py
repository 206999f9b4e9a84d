"""BlockLLM a second time, from its specification alone and as plainly as possible: what the method is tested against.

Every entry of every parameter has moments and a counter of its own, all dense; what is kept and what is trained are
boolean tensors; every update takes the full gradient from autograd. Nothing is saved and nothing is fast. fp32 only.
It shares no code with the method: the sign hash of the sketches and the keyed permutation are handed in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.blockllm_blocks import Block, Part, cut, entries_kept, layer, role, take, updates_of_entering, wave

SKETCH_SIZE = 1021
"""Buckets of a sketch; a prime, since rows of 1024 entries would add whole columns into one bucket of 1024."""

RECOMMENDED: dict[str, Any] = {
    "sparsity": 0.9,
    "mask": "none",
    "density": 1.0,
    "granularity": "tensor",
    "groups": (),
    "score": "norm",
    "patience": 100,
    "min_interval": 0,
    "max_interval": 500,
    "probe": 1,
    "probe_every": 0,
    "always": ("embedding", "head"),
    "norms": "with_layer",
    "state": "drop",
    "inactive": "none",
    "inactive_scale": 1.0,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
}


class Margin(NamedTuple):
    """How close a decision was: another implementation's rounding may turn over one whose `gap` is tiny.

    `gap` is relative: to the larger score, the mean loss, the last kept magnitude, the largest gradient.
    """

    step: int
    kind: str
    gap: float


class Outcome(NamedTuple):
    """What one update did.

    Attributes:
        loss: mean over the targets, before the update.
        kept_norm: Euclidean norm of the gradient of the entries that Adam moves, before clipping.
        selection: what was selected at its start, if anything.
        trained: the entries that Adam moved, by parameter.
    """

    loss: float
    kept_norm: float
    selection: dict[str, Any] | None
    trained: dict[str, Tensor]


class Reference:
    """BlockLLM on `model`, whose weights it writes.

    Args:
        model: a toy Llama in fp32.
        options: the `[method]` table; what it leaves out is that of the recommended variant.
        seed: of sketches and permutations.
        rates: update number -> (rate of the body, rate of embedding, head and norms).
        clip: limit of the kept norm; 0 is off.
        signs: (seed, key, entries, sketch size) -> +-1 per entry.
        permutation: (names of all blocks, number of the selection from 1) -> the names in random order.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        options: Mapping[str, Any],
        *,
        seed: int,
        rates: Callable[[int], tuple[float, float]],
        clip: float = 0.0,
        signs: Callable[[int, str, int, int], Tensor],
        permutation: Callable[[Sequence[str], int], Sequence[str]],
    ) -> None:
        assert options.keys() <= RECOMMENDED.keys(), options.keys() - RECOMMENDED.keys()
        self.model, self.seed, self.rates, self.clip = model, seed, rates, clip
        self.options = {**RECOMMENDED, **options}
        self.signs, self.permutation = signs, permutation
        self.weights = dict(model.named_parameters())
        self._divide()
        # Per entry: the two moments, the updates it was trained with them, and whether it holds state now.
        self.first = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.counts = {name: torch.zeros(weight.shape, dtype=torch.long) for name, weight in self.weights.items()}
        self.kept = {name: torch.full(weight.shape, name in self.dense) for name, weight in self.weights.items()}
        # Of the selection that holds: blocks trained whole, blocks trained in part, blocks that wait to enter.
        self.whole: list[Block] = []
        self.masked: list[Block] = []
        self.waiting: list[Block] = []
        self.share = Fraction(0)
        # What steers selections.
        self.selections = 0
        self.visits = {block.name: 0 for block in self.blocks}
        self.norms: dict[str, float] = {}
        self.known_at: dict[str, int] = {}
        self.losses: list[float] = []
        self.pointer = 0
        self.next_turn = 0
        self.margins: list[Margin] = []

    def _divide(self) -> None:
        """Parameters into dense ones, norms that ride, and candidates; candidates into blocks."""
        options = self.options
        self.dense, self.riding, candidates = [], [], []
        for name in self.weights:
            always = any(
                role(name) == entry if entry in ("embedding", "head") else re.search(entry, name)
                for entry in options["always"]
            )
            if always or (role(name) == "norm" and options["norms"] == "always"):
                self.dense.append(name)
            elif role(name) == "norm" and options["norms"] == "with_layer":
                self.riding.append(name)
            else:
                candidates.append(name)
        self.candidates = candidates
        self.entries = sum(self.weights[name].numel() for name in candidates)
        self.budget = math.floor((1 - Fraction(str(options["sparsity"]))) * self.entries)
        self.density = Fraction(str(options["density"]))
        self.nothing_to_choose = self.budget >= self.entries and (options["mask"] == "none" or self.density == 1)
        if self.nothing_to_choose:
            self.dense, self.blocks = self.dense + candidates, []
        else:
            chosen = {name: self.weights[name] for name in candidates}
            self.blocks = cut(chosen, self.budget, options["granularity"], options["groups"])
            self.dense_at_once = max(self.budget, *(block.size for block in self.blocks))
        self.needs_norms = options["score"] in ("norm", "rms") and not self.nothing_to_choose

    def update(self, step: int, batch: Any, *, carried_out: bool = True) -> Outcome:
        """Update `step`; one that is not carried out changes nothing."""
        loss, gradients = self._gradients(batch)
        if not carried_out:
            return Outcome(loss, math.nan, None, {})
        selection, entering = None, []
        if not self.nothing_to_choose:
            if self.selections == 0 and self.needs_norms:
                for block in self.blocks:
                    self._know(block, step, self._sketched_norm(block, gradients))
            cause = self._cause(step)
            if cause is not None:
                selection = self._select(step, cause)
            entering = wave(self.waiting, self.dense_at_once)
            self.waiting = self.waiting[len(entering) :]
            for block in entering:
                self._choose_entries(step, block, gradients)
        trained = self._trained()
        norm = math.sqrt(sum(float(gradients[name][mask].double().square().sum()) for name, mask in trained.items()))
        self._measure(step, gradients, entering)
        self._adam(step, gradients, trained, min(1.0, self.clip / (norm + 1e-6)) if self.clip > 0 else 1.0)
        if self.options["inactive"] != "none":
            self._move_inactive(step, gradients, trained)
        self.losses.append(loss)
        return Outcome(loss, norm, selection, trained)

    @property
    def state_entries(self) -> int:
        """Entries that hold moments, in host memory too."""
        return sum(int((kept | (self.counts[name] > 0)).sum()) for name, kept in self.kept.items())

    def _gradients(self, batch: Any) -> tuple[float, dict[str, Tensor]]:
        """Mean loss over the targets, and the full gradient of every parameter."""
        logits = self.model(batch.input_ids, batch.documents).flatten(0, 1)[batch.positions]
        loss = F.cross_entropy(logits, batch.targets)
        gradients = torch.autograd.grad(loss, self.weights.values())
        return float(loss.detach()), dict(zip(self.weights, gradients, strict=True))

    # When.

    def _cause(self, step: int) -> str | None:
        """Why update `step` selects. The losses at hand are those of the updates since the last selection."""
        if self.selections == 0:
            return "first"
        patience, since = self.options["patience"], len(self.losses)
        if since >= patience and since >= self.options["min_interval"]:
            mean = math.fsum(self.losses[-patience:]) / patience
            self._margin(step, "patience", abs(self.losses[-1] - mean) / mean)
            if self.losses[-1] >= mean:
                return "patience"
        if self.options["max_interval"] > 0 and since >= self.options["max_interval"]:
            return "max_interval"
        return None

    # Which blocks.

    def _score(self, block: Block) -> float:
        frequency = (1 + self.visits[block.name]) / (1 + self.selections)
        norm = self.norms[block.name]
        return (norm if self.options["score"] == "norm" else norm / math.sqrt(block.size)) / frequency

    def _walk(self, step: int) -> list[Block]:
        """All blocks in the order in which they are offered."""
        if self.options["score"] == "random":
            by_name = {block.name: block for block in self.blocks}
            return [by_name[name] for name in self.permutation(list(by_name), self.selections + 1)]
        if self.options["score"] == "cyclic":
            return self.blocks[self.next_turn :] + self.blocks[: self.next_turn]
        walk = sorted(self.blocks, key=self._score, reverse=True)  # stable: a tie goes to the earlier block
        for higher, lower in pairwise(map(self._score, walk)):
            self._margin(step, "order", (higher - lower) / higher)
        return walk

    def _select(self, step: int, cause: str) -> dict[str, Any]:
        walk = self._walk(step)
        taken, share = take(walk, self.budget, self.options["mask"], self.density)
        scored = self.needs_norms
        selection = {
            "number": self.selections + 1,
            "cause": cause,
            "blocks": [block.name for block in taken],
            "sizes": [block.size for block in taken],
            "kept": [entries_kept(block, share, self.options["mask"]) for block in taken],
            "enters": updates_of_entering(step, taken, share, self.dense_at_once),
            "scores": [self._score(block) for block in taken] if scored else None,
            "ages": [step - self.known_at[block.name] for block in taken] if scored else None,
        }
        for block in self.blocks:
            if block not in taken or self.options["state"] == "drop":
                for part in block.parts:
                    self._leave(part, torch.ones_like(self._of(self.kept, part)))
        for block in taken:
            self.visits[block.name] += 1
        selection["visits"] = dict(self.visits)
        self.selections += 1
        passed_over = [block for block in walk if block not in taken and block.size <= self.budget]
        self.next_turn = self.blocks.index((passed_over or walk)[0])
        self.losses.clear()
        self.share = share
        self.whole = taken if share == 1 else []
        self.waiting = [] if share == 1 else taken
        self.masked = []
        for block in self.whole:
            for part in block.parts:
                self._of(self.kept, part).fill_(True)
        return selection

    # Which entries.

    def _choose_entries(self, step: int, block: Block, gradients: Mapping[str, Tensor]) -> None:
        for part in block.parts:
            magnitudes = self._of(gradients, part).abs()
            if self.options["mask"] == "row":
                magnitudes = magnitudes.flatten(1).double().norm(dim=1) if magnitudes.dim() > 1 else magnitudes
            keeps = part.keeps(self.share, self.options["mask"])
            values, positions = magnitudes.flatten().sort(descending=True, stable=True)  # ties: the lower position
            if 0 < keeps < len(values):
                self._margin(step, "mask", float((values[keeps - 1] - values[keeps]) / values[keeps - 1]))
            mask = torch.zeros(magnitudes.numel(), dtype=torch.bool)
            mask[positions[:keeps]] = True
            kept = self._of(self.kept, part)
            mask = mask.view(magnitudes.shape + (1,) * (kept.dim() - magnitudes.dim())).expand(kept.shape)
            self._leave(part, ~mask)
            kept.copy_(mask)
        self.masked.append(block)

    def _leave(self, part: Part, entries: Tensor) -> None:
        """`entries` hold no state any more. Where state is offloaded it stays as it is until they are kept again."""
        self._of(self.kept, part)[entries] = False
        if self.options["state"] != "offload":
            for state in (self.first, self.second, self.counts):
                self._of(state, part)[entries] = 0

    def _trained(self) -> dict[str, Tensor]:
        """Entries that Adam moves in this update; decides which riding norms are awake."""
        trained = {name: torch.full(weight.shape, name in self.dense) for name, weight in self.weights.items()}
        for block in self.whole + self.masked:
            for part in block.parts:
                self._of(trained, part).copy_(self._of(self.kept, part))
        for name in self.riding:
            part = Part(name, 0, len(self.weights[name]), width=1, sliced=False)
            awake = any(bool(trained[host].any()) for host in self._hosts(name))
            trained[name].fill_(awake)
            if awake:
                self.kept[name].fill_(True)
            else:
                self._leave(part, torch.ones_like(self.kept[name]))
        return trained

    def _hosts(self, norm: str) -> list[str]:
        """The tensors that a norm rides with."""
        if layer(norm) is None:
            return ["lm_head.weight" if "lm_head.weight" in self.weights else "model.embed_tokens.weight"]
        return [name for name in self.weights if layer(name) == layer(norm) and name not in self.riding]

    # Norms of blocks.

    def _measure(self, step: int, gradients: Mapping[str, Tensor], entering: list[Block]) -> None:
        """Take down the norms that this update shows, and probe."""
        if not self.needs_norms:
            return
        if self.options["inactive"] != "none":
            for block in self.blocks:
                self._know(block, step, self._exact_norm(block, gradients))
            return
        for block in self.whole + entering:
            self._know(block, step, self._exact_norm(block, gradients))
        left = self.options["probe"]
        every = self.options["probe_every"] or math.ceil(34 * left / len(self.blocks))
        if left == 0 or step % every:
            return
        for block in self.blocks[self.pointer :] + self.blocks[: self.pointer]:
            if left > 0 and block not in self.whole and block not in entering:
                self._know(block, step, self._sketched_norm(block, gradients))
                self.pointer = (self.blocks.index(block) + 1) % len(self.blocks)
                left -= 1

    def _know(self, block: Block, step: int, norm: float) -> None:
        self.norms[block.name] = norm
        self.known_at[block.name] = step

    def _exact_norm(self, block: Block, gradients: Mapping[str, Tensor]) -> float:
        return math.sqrt(sum(float(self._of(gradients, part).double().square().sum()) for part in block.parts))

    def _sketched_norm(self, block: Block, gradients: Mapping[str, Tensor]) -> float:
        total = 0.0
        for part in block.parts:
            flat = self._of(gradients, part).flatten()
            signed = flat * self.signs(self.seed, part.key, flat.numel(), SKETCH_SIZE)
            buckets = torch.zeros(SKETCH_SIZE).index_add(0, torch.arange(flat.numel()) % SKETCH_SIZE, signed)
            total += float(buckets.double().square().sum())
        return math.sqrt(total)

    # Writing.

    def _rate(self, step: int, name: str) -> float:
        body, dense = self.rates(step)
        return body if role(name) == "body" else dense

    @torch.no_grad()
    def _adam(self, step: int, gradients: Mapping[str, Tensor], trained: Mapping[str, Tensor], factor: float) -> None:
        """Adam with decoupled decay, in torch's form, on the trained entries, each with its own counter."""
        (beta1, beta2), eps, decay = self.options["betas"], self.options["eps"], self.options["weight_decay"]
        for name, mask in trained.items():
            rate = self._rate(step, name)
            weight, first, second, counts = self.weights[name], self.first[name], self.second[name], self.counts[name]
            gradient = gradients[name][mask] * factor
            counts[mask] += 1
            first[mask] = beta1 * first[mask] + (1 - beta1) * gradient
            second[mask] = beta2 * second[mask] + (1 - beta2) * gradient * gradient
            one, two = ((1 - beta ** counts[mask].double()).float() for beta in (beta1, beta2))
            moved = first[mask] / one / ((second[mask] / two).sqrt() + eps)
            weight[mask] = weight[mask] * (1 - rate * decay) - rate * moved

    @torch.no_grad()
    def _move_inactive(self, step: int, gradients: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
        """Candidate entries that Adam did not move go by a rule without state."""
        for part in (part for block in self.blocks for part in block.parts):
            rest = ~self._of(trained, part)
            gradient = self._of(gradients, part)
            if not rest.any() or not gradient.isfinite().all():
                continue
            moving = gradient[rest]
            root = float(moving.double().square().mean().sqrt())
            if self.options["inactive"] == "sign":
                direction = moving.sign()
                if root > 0:
                    self._margin(step, "sign", float(moving[moving != 0].abs().min() / moving.abs().max()))
            else:
                direction = moving / root if root > 0 else torch.zeros_like(moving)
            self._of(self.weights, part)[rest] -= (
                self._rate(step, part.name) * self.options["inactive_scale"] * direction
            )

    @staticmethod
    def _of(tensors: Mapping[str, Tensor], part: Part) -> Tensor:
        return tensors[part.name][part.first : part.last]

    def _margin(self, step: int, kind: str, gap: float) -> None:
        self.margins.append(Margin(step, kind, gap))
