"""BlockLLM: train the blocks whose gradient is large and that were visited seldom, with Adam state for them alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockllm_cli.errors import GuardError, InputError
from blockllm_cli.footprint import TensorPlan, bytes_by_category
from blockllm_cli.gradients.clip import kept_norm
from blockllm_cli.gradients.routes import Dense, Gather, Layerwise, Route, Rows
from blockllm_cli.gradients.sketch import SIZE, Sketch, sketched_norm_squared
from blockllm_cli.methods.base import Backward, Event, Held, Method, MethodFacts, PassResult, Rates, Setting
from blockllm_cli.methods.blockllm.choosing import Chooser, Turn
from blockllm_cli.methods.blockllm.facts import FACTS
from blockllm_cli.methods.blockllm.inactive import InactiveRule
from blockllm_cli.methods.blockllm.layout import Layout, lay_out
from blockllm_cli.methods.blockllm.options import BlockLLMOptions
from blockllm_cli.methods.blockllm.planning import plan_selection, plan_tensors
from blockllm_cli.optim.adam import AdamRule
from blockllm_cli.optim.blocks import Block, Piece
from blockllm_cli.optim.entries import Entries
from blockllm_cli.optim.kept_state import KeptState
from blockllm_cli.optim.largest import largest_entries, largest_rows

NEW, SKETCH, INACTIVE = "@new", "@sketch", "@inactive"
"""Ends of route keys: a piece that begins to train, one whose norm is estimated, one under the rule without state."""


class BlockLLM(Method):
    """Ramesh et al. 2024 (arXiv 2406.17296), with an own choice of defaults; `docs/blockllm.md` has every rule.

    Differs from the paper in variant "recommended": selected blocks train whole instead of masked to their largest
    entries, embedding and head always train, norms train with their layer, and a selection comes after `max_interval`
    updates at the latest. Variant "paper" has none of these; variant "official" is the released class.
    """

    name = "blockllm"
    Options = BlockLLMOptions
    facts: ClassVar[MethodFacts] = FACTS

    def __new__(cls, options: BlockLLMOptions, setting: Setting) -> BlockLLM:
        """The variant that `options` ask for."""
        if cls is BlockLLM and options.variant == "official":
            from blockllm_cli.methods.blockllm.official import OfficialBlockLLM

            return super().__new__(OfficialBlockLLM)
        return super().__new__(cls)

    def __init__(self, options: BlockLLMOptions, setting: Setting) -> None:
        precision = setting.precision.with_moments(options.state_dtype)
        self._options = options
        self._setting = setting
        self._precision = precision
        self._accumulator = precision.accumulator(setting.micro_batches)
        rule = AdamRule(options.betas, options.eps, options.weight_decay, decoupled=True)
        self._state = KeptState(rule, precision, setting.seed, options.state, weights_move=options.inactive != "none")
        self._inactive: InactiveRule | None = None
        if options.inactive != "none":
            self._inactive = InactiveRule(options.inactive, options.inactive_scale, precision, setting.seed)
        legal = setting.micro_batches == 1 and setting.layerwise_allowed
        self._is_layerwise = self._inactive is not None and (legal if options.layerwise is None else options.layerwise)
        self._chooser: Chooser | None = None
        self._turn: Turn | None = None
        self._norms: dict[str, Tensor] = {}
        self._new_entries: dict[str, Entries] = {}
        self._dense: dict[str, Tensor] = {}

    def plan(self, shapes: Mapping[str, tuple[int, ...]]) -> list[TensorPlan]:
        """An upper bound per category: what is selected depends on the data. See `Method.plan`."""
        return plan_tensors(
            self._layout(shapes), self._options, self._precision, self._accumulator, is_layerwise=self._is_layerwise
        )

    def plan_selection(self) -> list[TensorPlan]:
        """What is held once all blocks of the newest selection have entered, exact with state = "drop"."""
        chooser = self.chooser
        kept = {}
        for name in (*chooser.trained, *chooser.waiting):
            for piece in self._pieces(name):
                width = piece.size // piece.shape[0] if self._options.mask == "row" else 1
                kept[piece.key] = (piece, chooser.kept_units(piece, chooser.share), width)
        return plan_selection(chooser.layout, self._precision, self._accumulator, kept)

    def _layout(self, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        return lay_out(shapes, self._options)

    def prepare(self, model: nn.Module) -> None:
        """Divide the model, and make the state of what always trains. See `Method.prepare`."""
        parameters = dict(model.named_parameters())
        layout = self._layout({name: tuple(parameter.shape) for name, parameter in parameters.items()})
        self._chooser = Chooser(layout, self._options, self._setting.seed)
        self._state.attach(parameters)
        for piece in layout.always:
            self._state.start(piece, Entries.all(piece.shape))

    @property
    def chooser(self) -> Chooser:
        """What chooses; exists once the method was prepared."""
        assert self._chooser is not None
        return self._chooser

    def passes(self, step: int, rates: Rates) -> Generator[Backward, PassResult, None]:
        """A scouting pass before the first selection, then the pass of the update. See `Method.passes`."""
        chooser = self.chooser
        # What an update that was given up left behind.
        self._turn, self._norms, self._new_entries, self._dense = None, {}, {}, {}
        scouted = None
        if chooser.wants_scouting:
            blocks = chooser.layout.blocks
            result = yield Backward(dict(self._sketch(piece) for block in blocks for piece in block.pieces))
            norms = {block.name: _estimated(block, result.gradients) for block in blocks}
            values = torch.stack(list(norms.values())).tolist()
            scouted = dict(zip(norms, values, strict=True))
        self._turn = chooser.turn(step, scouted)
        yield Backward(self._routes(self._turn, rates))

    def _routes(self, turn: Turn, rates: Rates) -> dict[str, Route]:
        routes: dict[str, Route] = {}
        steady = self._steady_pieces(turn)
        for piece in steady:
            for record in self._state.active[piece.key]:
                inner: Route = Dense(self._accumulator)
                if not record.entries.is_all:
                    inner = Gather(record.entries, self._accumulator)
                routes[record.key] = _of_piece(piece, inner)
        for piece in self._new_pieces(turn):
            routes[piece.key + NEW] = _of_piece(piece, Dense(self._accumulator))
        for name in turn.probed:
            routes.update(self._sketch(piece) for piece in self.chooser.blocks[name].pieces)
        if self._inactive is not None:
            routes.update(self._inactive_routes(turn, rates, {piece.key for piece in steady}))
        return routes

    def _steady_pieces(self, turn: Turn) -> list[Piece]:
        """Pieces that train on with the state they have."""
        layout = self.chooser.layout
        pieces = list(layout.always)
        if turn.selection is None:
            entering = set(turn.entering)
            pieces += [piece for name in turn.trained if name not in entering for piece in self._pieces(name)]
        pieces += [piece for piece in self._riders(turn) if piece.key in self._state.active]
        return pieces

    def _new_pieces(self, turn: Turn) -> list[Piece]:
        """Pieces that begin to train, or whose share or state may change, in this update."""
        pieces = [piece for name in turn.entering for piece in self._pieces(name)]
        return pieces + [piece for piece in self._riders(turn) if piece.key not in self._state.active]

    def _riders(self, turn: Turn) -> list[Piece]:
        parameters = frozenset(piece.parameter for name in turn.trained for piece in self._pieces(name))
        return self.chooser.layout.rider_pieces(parameters)

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        return self.chooser.blocks[name].pieces

    def _sketch(self, piece: Piece) -> tuple[str, Route]:
        return piece.key + SKETCH, _of_piece(piece, Sketch(SIZE, self._setting.seed, piece.key))

    def _inactive_routes(self, turn: Turn, rates: Rates, steady: set[str]) -> Iterator[tuple[str, Route]]:
        """Routes for the pieces of which entries have no state; those that enter masked are dense anyway."""
        entering = {piece.key for piece in self._new_pieces(turn)}
        for block in self.chooser.layout.blocks:
            for piece in block.pieces:
                kept = self._kept(piece, steady)
                if piece.key in entering or sum(entries.count for entries in kept) == piece.size:
                    continue
                inner: Route = Dense(self._accumulator)
                if self._is_layerwise:
                    inner = Layerwise(partial(self._write_inactive, turn.step, rates, piece, kept))
                yield piece.key + INACTIVE, _of_piece(piece, inner)

    def _kept(self, piece: Piece, steady: set[str]) -> list[Entries]:
        """The entries of `piece` that train on with the state they have, if it is among the `steady`."""
        return [record.entries for record in self._state.active.get(piece.key, [])] if piece.key in steady else []

    def _write_inactive(self, step: int, rates: Rates, piece: Piece, kept: Sequence[Entries], gradient: Tensor) -> None:
        assert self._inactive is not None
        self._norms[piece.key] = self._inactive.write(
            self._state.weight(piece),
            gradient,
            kept,
            rate=rates.of(piece.parameter),
            key=f"{piece.key}/inactive/{step}",
        )

    def choose(self, step: int, results: Sequence[PassResult]) -> dict[str, Tensor]:
        """Choose the masks of what enters from its whole gradient, and measure norms. See `Method.choose`."""
        assert self._turn is not None
        turn, gradients = self._turn, results[-1].gradients
        chosen: dict[str, Tensor] = {}
        for name in turn.probed:
            for piece in self._pieces(name):
                self._norms[piece.key] = sketched_norm_squared(gradients.pop(piece.key + SKETCH)).sqrt()
        self._dense = {key: gradients.pop(key) for key in [*gradients] if key.endswith(INACTIVE)}
        for piece in self._steady_pieces(turn):
            for record in self._state.active[piece.key]:
                chosen[record.key] = gradients.pop(record.key)
        is_masked = self._share(turn) != 1
        entering = {piece.key for name in turn.entering for piece in self._pieces(name)}
        for piece in self._new_pieces(turn):
            gradient = gradients.pop(piece.key + NEW)
            if is_masked and piece.key in entering:
                chosen[piece.key + NEW] = self._mask(turn, piece, gradient)
            else:
                chosen[piece.key + NEW] = gradient
        if not is_masked and self.chooser.measures_trained:
            self._measure_whole(turn, chosen)
        # In the model's order, as a dense method has them: the kept norm is then the same to the last bit.
        order = {name: index for index, name in enumerate(self.chooser.layout.shapes)}
        return dict(sorted(chosen.items(), key=lambda item: order[item[0].partition("@")[0]]))

    def _share(self, turn: Turn) -> Fraction:
        return turn.selection.share if turn.selection is not None else self.chooser.share

    def _mask(self, turn: Turn, piece: Piece, gradient: Tensor) -> Tensor:
        """Choose what is kept of a piece that enters; returns the kept entries of its gradient."""
        units = self.chooser.kept_units(piece, self._share(turn))
        if self._options.mask == "row":
            entries = Entries.of(largest_rows(gradient, units), piece.shape, "row")
        else:
            entries = Entries.of(largest_entries(gradient, units), piece.shape)
        self._new_entries[piece.key] = entries
        if self._inactive is not None:
            self._dense[piece.key + NEW] = gradient
        elif self.chooser.measures_trained:
            self._norms[piece.key] = kept_norm([gradient])
        return entries.gather(gradient)

    def _measure_whole(self, turn: Turn, chosen: Mapping[str, Tensor]) -> None:
        for name in turn.trained:
            for piece in self._pieces(name):
                # With state that goes on, a piece that is whole now may consist of entries that started apart.
                keys = [piece.key + NEW]
                if keys[0] not in chosen:
                    keys = [record.key for record in self._state.active[piece.key]]
                self._norms[piece.key] = kept_norm([chosen[key] for key in keys])

    def update(
        self, step: int, rates: Rates, chosen: Mapping[str, Tensor], loss: float, *, count_unchanged: bool = False
    ) -> list[Event]:
        """Change what is trained, apply Adam to it and the inactive rule to the rest. See `Method.update`."""
        assert self._turn is not None
        turn = self._turn
        steady = {piece.key for piece in self._steady_pieces(turn)}
        new = self._new_pieces(turn)
        self._change(turn, new)
        gradients = dict(chosen)
        for piece in new:
            gradient = gradients.pop(piece.key + NEW)
            gradients.update(self._by_record(piece, gradient))
        # Entries under the inactive rule are not counted.
        self._unchanged = self._state.update(gradients, rates.of, step, count_unchanged=count_unchanged)
        self._write_dense(step, rates, steady)
        events = self._unmoved_events()
        self.chooser.commit(turn, self._block_norms(), loss)
        if turn.selection is not None:
            planned = bytes_by_category(self.plan_selection())
            events.append({**self.chooser.event(turn, turn.selection), "bytes": planned})
        self._turn, self._norms, self._new_entries = None, {}, {}
        return events

    def _write_dense(self, step: int, rates: Rates, steady: set[str]) -> None:
        """Apply the inactive rule to the pieces whose gradient was kept for it, which is free after each."""
        for block in self.chooser.layout.blocks:
            for piece in block.pieces:
                for end in (NEW, INACTIVE):
                    gradient = self._dense.pop(piece.key + end, None)
                    if gradient is not None:
                        kept = [self._new_entries[piece.key]] if end == NEW else self._kept(piece, steady)
                        self._write_inactive(step, rates, piece, kept, gradient)

    def _change(self, turn: Turn, new: Sequence[Piece]) -> None:
        """Stop what this update does not train any more, then start what it begins to train."""
        chooser, state = self.chooser, self._state
        going_on = {piece.key for name in turn.trained for piece in self._pieces(name)}
        if self._options.state != "drop":
            going_on |= {piece.key for name in turn.waiting for piece in self._pieces(name)}
        elif turn.selection is not None:
            going_on.clear()
        riders = {piece.key for piece in self._riders(turn)}
        always = {piece.key for piece in chooser.layout.always}
        state.stop([key for key in [*state.active] if key not in always | riders | going_on])
        for piece in new:
            state.start(piece, self._new_entries.get(piece.key) or Entries.all(piece.shape))
        trained = state.active_entries(piece.key for name in turn.trained for piece in self._pieces(name))
        if trained > chooser.layout.budget:
            raise GuardError(
                f"update {turn.step}: {trained} entries of the candidates have state, the budget is "
                f"{chooser.layout.budget}; this is a fault of blockllm, please report it with the recipe"
            )

    def _by_record(self, piece: Piece, gradient: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The gradient of a piece's kept entries, divided among its records."""
        records = self._state.active[piece.key]
        if len(records) == 1:
            yield records[0].key, gradient
            return
        entries = self._new_entries.get(piece.key)
        flat = gradient.reshape(-1)
        positions = torch.arange(flat.numel(), device=flat.device) if entries is None else entries.positions()
        for record in records:
            yield record.key, flat[torch.searchsorted(positions, record.entries.positions())]

    def _block_norms(self) -> dict[str, Tensor]:
        """Norms of the blocks of which every piece was measured in this update."""
        found: dict[str, Tensor] = {}
        if not self.chooser.measures_trained:
            return found
        for block in self.chooser.layout.blocks:
            parts = [self._norms[piece.key] for piece in block.pieces if piece.key in self._norms]
            if len(parts) == len(block.pieces):
                found[block.name] = torch.stack(parts).square().sum().sqrt()
        return found

    def _unmoved_events(self) -> list[Event]:
        """What the inactive rule left alone because its gradient was not finite."""
        if self._inactive is None or not self._norms:
            return []
        keys = list(self._norms)
        finite = torch.isfinite(torch.stack([self._norms[key] for key in keys])).tolist()
        unmoved = [key for key, is_finite in zip(keys, finite, strict=True) if not is_finite]
        return [{"kind": "nonfinite", "pieces": unmoved}] if unmoved else []

    def state_dict(self) -> dict[str, Any]:
        """The tensors of `KeptState`, and under `choice` what chooses. See `Method.state_dict`."""
        return {**self._state.state_dict(), "choice": self.chooser.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Method.load_state_dict`."""
        if "choice" not in state:
            raise InputError("the state to load has no 'choice': it is not that of blockllm")
        self._state.load_state_dict(state)
        self.chooser.restore(state["choice"])

    def held(self) -> Iterator[Held]:
        """Moments, master copies and indices."""
        for name, category, tensor in self._state.held():
            yield Held(name, category, tensor)

    @property
    def state_entries(self) -> int:
        """Elements of first moments, those parked in host memory included."""
        return self._state.first_moment_entries

    @property
    def trainable_entries(self) -> int:
        """Entries with state, or, with an inactive rule, all."""
        if self._inactive is None:
            return self._state.entries
        layout = self.chooser.layout
        candidates = {piece.key for block in layout.blocks for piece in block.pieces}
        return layout.candidates + self._state.active_entries(self._state.active.keys() - candidates)


def _of_piece(piece: Piece, inner: Route) -> Route:
    return inner if piece.rows is None else Rows(*piece.rows, inner)


def _estimated(block: Block, sketches: Mapping[str, Tensor]) -> Tensor:
    """Estimate of a block's gradient norm from the sketches of its pieces."""
    squares = [sketched_norm_squared(sketches[piece.key + SKETCH]) for piece in block.pieces]
    return torch.stack(squares).sum().sqrt()
