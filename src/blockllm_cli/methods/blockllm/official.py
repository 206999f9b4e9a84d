"""Variant "official": training as the released class does it, on the same routes and state."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blockllm_cli.errors import InputError
from blockllm_cli.footprint import TensorPlan
from blockllm_cli.gradients.clip import kept_norm
from blockllm_cli.gradients.routes import Dense, Route
from blockllm_cli.methods.base import Backward, Event, PassResult, Rates, Setting
from blockllm_cli.methods.blockllm.method import BlockLLM
from blockllm_cli.methods.blockllm.options import BlockLLMOptions
from blockllm_cli.methods.blockllm.released import Released
from blockllm_cli.optim.adam import AdamRule
from blockllm_cli.optim.blocks import Piece
from blockllm_cli.optim.entries import Entries
from blockllm_cli.optim.kept_state import KeptState


class OfficialBlockLLM(BlockLLM):
    """The released class (`released` has its source and its differences to the paper).

    Adam knows neither `eps` nor `weight_decay` nor the schedule: its rate is the peak, always. All tensors that train
    are matrices or norms, at the body's rate.
    """

    def __init__(self, options: BlockLLMOptions, setting: Setting) -> None:
        super().__init__(options, setting)
        # The release passes the rate and the betas on, and nothing else.
        self._state = KeptState(AdamRule(options.betas), self._precision, setting.seed, "drop")
        self._rate = setting.peak.body
        self._released: Released | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}

    def trains(self, name: str) -> bool:
        """Embedding and head never train."""
        return not ("embed" in name or "lm_head" in name)

    def _make(self, shapes: Mapping[str, tuple[int, ...]]) -> Released:
        sizes = {name: Piece(name, tuple(shape)).size for name, shape in shapes.items()}
        options = self._options
        assert options.update_freq is not None  # filled by the variant
        return Released(
            sizes={name: size for name, size in sizes.items() if self.trains(name)},
            sparsity=options.sparsity,
            update_freq=options.update_freq,
            patience=options.patience,
            probe=options.probe,
            probe_every=options.probe_every,
            seed=self._setting.seed,
        )

    def plan(self, shapes: Mapping[str, tuple[int, ...]]) -> list[TensorPlan]:
        """An upper bound: the start takes a share of the tensors, whatever they hold. See `Method.plan`."""
        released = self._make(shapes)
        largest = sorted(released.sizes.values(), reverse=True)
        most = max(sum(largest[: released.first_count]), released.limit, largest[0])
        most = min(most, sum(largest))
        watched = sum(largest[: self._options.probe])
        moments = str(self._precision.moments).removeprefix("torch.")
        plans = [
            TensorPlan("selected", "gradients", (most,), str(self._accumulator).removeprefix("torch."), "update"),
            TensorPlan("watched", "gradients", (watched,), str(self._accumulator).removeprefix("torch."), "update"),
            TensorPlan("selected.exp_avg", "optimizer_state", (most,), moments),
            TensorPlan("selected.exp_avg_sq", "optimizer_state", (most,), moments),
        ]
        if self._precision.has_master:
            plans.append(TensorPlan("selected.master", "master_weights", (most,), "float32"))
        return plans

    def prepare(self, model: nn.Module) -> None:
        """Draw the tensors of the start. See `Method.prepare`."""
        parameters = dict(model.named_parameters())
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._state.attach(parameters)
        self._released = self._make(self._shapes)
        self._released.begin()
        self._start_selected()

    @property
    def released(self) -> Released:
        """The release's choices; exist once the method was prepared."""
        assert self._released is not None
        return self._released

    def _start_selected(self) -> None:
        self._state.stop([*self._state.active])
        for name in self.released.selected:
            self._state.start(Piece(name, self._shapes[name]), Entries.all(self._shapes[name]))

    def passes(self, step: int, rates: Rates) -> Generator[Backward, PassResult, None]:
        """One pass; what is watched keeps its whole gradient, as in the release."""
        routes: dict[str, Route] = {record.key: Dense(self._accumulator) for record in self._state.records()}
        routes.update({name: Dense(self._accumulator) for name in self.released.watched})
        yield Backward(routes)

    def choose(self, step: int, results: Sequence[PassResult]) -> dict[str, Tensor]:
        """The gradients of what is selected; norms of that and of what is watched."""
        gradients = results[-1].gradients
        self._norms = {name: kept_norm([gradients.pop(name)]) for name in self.released.watched}
        for record in self._state.records():
            self._norms[record.piece.parameter] = kept_norm([gradients[record.key]])
        return gradients

    def update(
        self, step: int, rates: Rates, chosen: Mapping[str, Tensor], loss: float, *, count_unchanged: bool = False
    ) -> list[Event]:
        """Adam on what is selected; the very first update changes nothing."""
        if step == 1:
            return []
        self._unchanged = self._state.update(chosen, lambda _: self._rate, step, count_unchanged=count_unchanged)
        values = torch.stack(list(self._norms.values())).tolist()
        norms = dict(zip(self._norms, values, strict=True))
        released = self.released
        if not released.after_update(step, norms, loss):
            return []
        self._start_selected()
        return [self._event(step)]

    def _event(self, step: int) -> Event:
        released = self.released
        blocks = [
            {
                "name": name,
                "size": size,
                "score": None,
                "norm": released.norms.get(name),
                "age": None,
                "visits": released.visits[name],
            }
            for name, size in released.sizes.items()
        ]
        taken = [block for block in blocks if block["name"] in released.selected]
        return {
            "kind": "selection",
            "number": None,
            "cause": "release",
            "budget": released.limit,
            "candidates": sum(released.sizes.values()),
            "kept": sum(released.sizes[name] for name in released.selected),
            "share": 1.0,
            "blocks": [{**block, "kept": block["size"], "enters": step + 1} for block in taken],
            "others": [block for block in blocks if block["name"] not in released.selected],
        }

    def state_dict(self) -> dict[str, Any]:
        """The tensors of `KeptState`, and under `release` what the release decided."""
        return {**self._state.state_dict(), "release": self.released.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Method.load_state_dict`."""
        if "release" not in state:
            raise InputError("the state to load has no 'release': it is not that of blockllm, variant \"official\"")
        self._state.load_state_dict(state)
        self.released.restore(state["release"])

    @property
    def trainable_entries(self) -> int:
        """Entries of what is selected."""
        return self._state.entries
