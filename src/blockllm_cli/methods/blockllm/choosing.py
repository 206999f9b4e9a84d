"""When BlockLLM selects, what it takes, in which updates that enters, and which norms it looks at meanwhile.

`turn` says what an update will do and changes nothing; `commit` is told that it was done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor

from blockllm_cli.errors import GuardError
from blockllm_cli.methods.blockllm.layout import Layout
from blockllm_cli.methods.blockllm.options import BlockLLMOptions
from blockllm_cli.optim.blocks import Block, Piece
from blockllm_cli.optim.selection import (
    Norms,
    Patience,
    Visits,
    at_random,
    by_falling,
    next_in_round,
    starting_at,
    take_masked,
    take_whole,
    wave,
)


@dataclass(frozen=True)
class Selection:
    """One choice of blocks.

    Attributes:
        number: from 1.
        cause: "first", "patience", "max_interval", or "all" where there is nothing to choose.
        taken: names, in the order in which they were taken.
        share: of each taken block that is kept; 1 is whole.
        scores: block -> score, empty where the order is not by score.
        ages: block -> updates since its norm was measured.
        next_turn: where a cyclic order goes on: at the first block that was passed over, so that none waits for ever.
    """

    number: int
    cause: str
    taken: tuple[str, ...]
    share: Fraction
    scores: Mapping[str, float]
    ages: Mapping[str, int]
    next_turn: str | None = None


@dataclass(frozen=True)
class Turn:
    """What one update does beside training on.

    Attributes:
        step: number of the update.
        selection: made at its start, or None.
        norms: known when it was made.
        entering: blocks that begin to train in this update.
        waiting: blocks that will enter in later ones.
        trained: all blocks that train in this update, those that enter included.
        probed: blocks whose norm is estimated.
    """

    step: int
    selection: Selection | None
    norms: Mapping[str, float]
    entering: tuple[str, ...]
    waiting: tuple[str, ...]
    trained: tuple[str, ...]
    probed: tuple[str, ...]


class Chooser:
    """The choices of one run.

    Saved are the norms with their updates, visits, the patience window, what is trained and what waits, and where the
    rounds of probes and of cyclic order stand.
    """

    def __init__(self, layout: Layout, options: BlockLLMOptions, seed: int) -> None:
        self.layout = layout
        self.blocks: dict[str, Block] = {block.name: block for block in layout.blocks}
        self._names = list(self.blocks)
        self._sizes = {name: block.size for name, block in self.blocks.items()}
        self._options = options
        self._seed = seed
        self._measures = options.score in ("norm", "rms") and not layout.nothing_to_choose
        self._wave = max([layout.budget, *self._sizes.values()])
        self._probe_every = options.probe_every or math.ceil(34 * options.probe / max(1, len(self._names))) or 1
        self.norms = Norms()
        self.visits = Visits()
        self._patience = Patience(options.patience, options.min_interval, options.max_interval)
        self._trained: tuple[str, ...] = ()
        self._waiting: tuple[str, ...] = ()
        self.share = Fraction(1)
        self._last_probed: str | None = None
        self._next_turn: str | None = None

    @property
    def wants_scouting(self) -> bool:
        """Whether the next selection is the first and goes by norms, which nobody knows yet."""
        return self._measures and self.visits.selections == 0

    @property
    def measures_trained(self) -> bool:
        """Whether norms of what is trained are wanted."""
        return self._measures

    def kept_units(self, piece: Piece, share: Fraction) -> int:
        """Entries (or rows) that a mask keeps of a piece."""
        return math.floor(share * (piece.shape[0] if self._options.mask == "row" else piece.size))

    def kept_entries(self, block: Block, share: Fraction) -> int:
        """Entries that are kept of a block."""
        return sum(
            self.kept_units(piece, share) * (piece.size // piece.shape[0] if self._options.mask == "row" else 1)
            for piece in block.pieces
        )

    def turn(self, step: int, scouted: Mapping[str, float] | None = None) -> Turn:
        """What update `step` does; `scouted` are norms of all blocks at its weights, if they were looked at first."""
        cause = self._cause()
        selection, norms = None, {}
        trained, waiting, share = self._trained, self._waiting, self.share
        if cause is not None:
            norms = dict(scouted) if scouted is not None else self.norms.read()
            selection = self._select(step, cause, norms, is_scouted=scouted is not None)
            trained, waiting, share = (), selection.taken, selection.share
        entering = waiting if share == 1 else tuple(wave(waiting, self._sizes, self._wave))
        trained += entering
        whole = set(trained) if share == 1 else set()
        return Turn(
            step=step,
            selection=selection,
            norms=norms,
            entering=entering,
            waiting=waiting[len(entering) :],
            trained=trained,
            probed=tuple(self._probes(step, whole | set(entering))),
        )

    def _cause(self) -> str | None:
        if self.visits.selections == 0:
            return "all" if self.layout.nothing_to_choose else "first"
        return None if self.layout.nothing_to_choose else self._patience.cause()

    def _select(self, step: int, cause: str, norms: Mapping[str, float], *, is_scouted: bool) -> Selection:
        scores, number = self._scores(norms), self.visits.selections + 1
        if cause == "all":
            return Selection(number, cause, tuple(self._names), Fraction(1), {}, {})
        if self._options.score == "random":
            order = at_random(self._names, self._seed, number)
        elif self._options.score == "cyclic":
            order = starting_at(self._names, self._next_turn)
        else:
            order = by_falling(scores, self._names)
        share = Fraction(1)
        if self._options.mask == "none":
            taken = take_whole(order, self._sizes, self.layout.budget)
        else:
            taken, share = take_masked(
                order,
                self._sizes,
                self.layout.budget,
                self._options.density,
                lambda name, z: self.kept_entries(self.blocks[name], z),
            )
        if not taken:
            raise GuardError(
                f"update {step}: the selection took nothing, since method.density = {self._options.density:g} keeps "
                f"less than one entry or row of every block; raise it"
            )
        ages = {name: 0 if is_scouted else step - (self.norms.step_of(name) or 0) for name in norms}
        passed = (name for name in order if name not in taken and self._sizes[name] <= self.layout.budget)
        return Selection(number, cause, tuple(taken), share, scores, ages, next(passed, order[0]))

    def _scores(self, norms: Mapping[str, float]) -> dict[str, float]:
        """Norm (or its root mean square) over visit frequency, of the blocks whose norm is known."""
        if not self._measures:
            return {}
        scores = {}
        for name, norm in norms.items():
            size = math.sqrt(self._sizes[name]) if self._options.score == "rms" else 1.0
            scores[name] = norm / size / self.visits.frequency(name)
        return scores

    def _probes(self, step: int, closed: set[str]) -> list[str]:
        options = self._options
        if not self._measures or options.inactive != "none" or options.probe == 0 or step % self._probe_every:
            return []
        return next_in_round(self._names, self._last_probed, options.probe, lambda name: name not in closed)

    def commit(self, turn: Turn, norms: Mapping[str, Tensor], loss: float) -> None:
        """Update `turn.step` was carried out; `norms` (scalars) were measured in it."""
        if turn.selection is not None:
            # Norms known at a first selection are of blocks that may not be looked at again for a long time.
            if self.visits.selections == 0:
                self.norms.put(turn.norms, turn.step)
            self.visits.count(turn.selection.taken)
            self.share = turn.selection.share
            self._next_turn = turn.selection.next_turn
            self._patience.clear()
        self._trained, self._waiting = turn.trained, turn.waiting
        if turn.probed:
            self._last_probed = turn.probed[-1]
        self.norms.note(norms, turn.step)
        self._patience.note(loss)

    def event(self, turn: Turn, selection: Selection) -> dict[str, Any]:
        """The line of events.jsonl for a selection, after `commit`."""
        enters, step, waiting = {}, turn.step, list(selection.taken)
        while waiting:
            now = waiting if selection.share == 1 else wave(waiting, self._sizes, self._wave)
            enters.update(dict.fromkeys(now, step))
            waiting, step = waiting[len(now) :], step + 1
        kept = {name: self.kept_entries(self.blocks[name], selection.share) for name in selection.taken}
        others = [name for name in by_falling(selection.scores, self._names) if name not in kept]
        return {
            "kind": "selection",
            "number": selection.number,
            "cause": selection.cause,
            "budget": self.layout.budget,
            "candidates": self.layout.candidates,
            "kept": sum(kept.values()),
            "share": float(selection.share),
            "blocks": [
                {**self._described(turn, selection, name), "kept": kept[name], "enters": enters[name]}
                for name in selection.taken
            ],
            "others": [self._described(turn, selection, name) for name in others],
        }

    def _described(self, turn: Turn, selection: Selection, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "size": self._sizes[name],
            "score": selection.scores.get(name),
            "norm": turn.norms.get(name),
            "age": selection.ages.get(name),
            "visits": self.visits.times.get(name, 0),
        }

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "norms": self.norms.state(),
            "selections": self.visits.selections,
            "visits": dict(self.visits.times),
            "patience": self._patience.state(),
            "trained": list(self._trained),
            "waiting": list(self._waiting),
            "share": str(self.share),
            "last_probed": self._last_probed,
            "next_turn": self._next_turn,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self.norms.restore(saved["norms"])
        self.visits.selections, self.visits.times = saved["selections"], dict(saved["visits"])
        self._patience.restore(saved["patience"])
        self._trained, self._waiting = tuple(saved["trained"]), tuple(saved["waiting"])
        self.share = Fraction(saved["share"])
        self._last_probed, self._next_turn = saved["last_probed"], saved["next_turn"]

    @property
    def waiting(self) -> tuple[str, ...]:
        """Blocks of the newest selection that have not entered yet."""
        return self._waiting

    @property
    def trained(self) -> tuple[str, ...]:
        """Blocks that the last update trained."""
        return self._trained
