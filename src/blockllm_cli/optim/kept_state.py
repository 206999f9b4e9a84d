"""The state of a rule over entries that change: moments, counters, master copies of what is trained now and no more.

What is held of a piece is a list of records. A record has one step counter; entries of a piece that started at the same
update share one record. Whole pieces are updated in place; of others the kept entries are gathered to a vector, updated
by the same kernel, and scattered back. Where Triton serves, its kernel does all that for all records at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from blockllm_cli.errors import InputError
from blockllm_cli.footprint import Category
from blockllm_cli.optim.blocks import Piece
from blockllm_cli.optim.entries import Entries, Unit, positions_within
from blockllm_cli.optim.pool import Pool
from blockllm_cli.optim.precision import Precision
from blockllm_cli.optim.rules import DenseRule
from blockllm_cli.optim.slices import Stored
from blockllm_cli.optim.stored import StoredRule
from blockllm_cli.optim.triton_adam import Target, TritonAdam, triton_adam

Policy = Literal["drop", "keep", "offload"]

MASTER = "master"


@dataclass
class Record:
    """Entries of one piece that started together.

    Attributes:
        piece: where they are.
        serial: tells records apart; unique in a run.
        entries: which they are.
        slots: state by name, each 1-D (entries.count,); in host memory if the record is parked.
        counter: updates since the start that they took part in.
        master: fp32 copy of the entries, or None.
        target: what Triton's kernel is told of the entries, once it was.
    """

    piece: Piece
    serial: int
    entries: Entries
    slots: dict[str, Tensor]
    counter: int = 0
    master: Tensor | None = field(default=None, repr=False)
    target: Target | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        """`<piece>@<serial>`, also the key of the route that feeds it."""
        return f"{self.piece.key}@{self.serial}"


class KeptState:
    """State of `rule` over records.

    Args:
        rule: what is done to each entry.
        precision: dtypes of weights, gradients and state, and the rounding of bf16 writes.
        seed: of stochastic rounding; draws are keyed by (seed, piece, update).
        policy: what becomes of the state of entries that stop: it is dropped; the same, but entries that are wanted
            again at once go on with theirs ("keep"); or it waits in host memory until they are ("offload"). With "drop"
            every start is from zero.
        weights_move: whether others write entries that have no active state, so that a parked master copy is stale.
    """

    def __init__(
        self,
        rule: DenseRule,
        precision: Precision,
        seed: int,
        policy: Policy = "drop",
        *,
        weights_move: bool = False,
    ) -> None:
        self._rule = rule
        self._precision = precision
        self._policy = policy
        self._seed = seed
        self._stored_rule = StoredRule(rule, precision, seed)
        self._triton: TritonAdam | None = None
        self._weights: dict[str, Tensor] = {}
        self.active: dict[str, list[Record]] = {}
        self.parked: dict[str, Pool] = {}
        self._weights_move = weights_move
        self._records_made = 0

    def attach(self, weights: Mapping[str, Tensor]) -> None:
        """Take hold of `weights` by parameter name; `update` writes them. Nothing is allocated.

        Raises:
            ValueError: a weight is not contiguous, or not of the precision's dtype.
        """
        for name, weight in weights.items():
            if weight.dtype != self._precision.weights or not weight.is_contiguous():
                raise ValueError(f"{name} is {weight.dtype} with strides {weight.stride()}: not what the state is for")
            self._weights[name] = weight.detach()
        self._triton = triton_adam(self._rule, self._precision, self._seed, self._weights.values())

    def weight(self, piece: Piece) -> Tensor:
        """The weights of `piece`, a view."""
        return piece.of(self._weights[piece.parameter])

    def records(self) -> Iterator[Record]:
        """The records that are trained, in the order in which their pieces became active."""
        for records in self.active.values():
            yield from records

    def stop(self, keys: Iterable[str]) -> None:
        """Stop training the pieces with these keys: their state is dropped, or parked with policy "offload"."""
        for key in keys:
            records = self.active.pop(key, [])
            if self._policy == "offload":
                self._park(key, [self._pool_of(record) for record in records])

    def _park(self, key: str, pools: list[Pool]) -> None:
        pools = [*pools, *self._parked_pools(key)]
        if any(pool.units.numel() for pool in pools):
            pool = Pool.merged(pools, torch.device("cpu"))
            self.parked[key] = replace(pool, units=pool.units.int())

    def _parked_pools(self, key: str) -> list[Pool]:
        pool = self.parked.pop(key, None)
        return [] if pool is None else [pool]

    def _pool_of(self, record: Record) -> Pool:
        # All entries are all rows, which takes fewer units.
        unit: Unit = "row" if record.entries.is_all else record.entries.unit
        units = record.entries.units(self.weight(record.piece).device, unit)
        values = {**record.slots, **({} if record.master is None else {MASTER: record.master})}
        width = prod(record.piece.shape[1:]) if unit == "row" else 1
        return Pool(
            width,
            units,
            torch.full(units.shape, record.counter, dtype=torch.int32, device=units.device),
            {name: value.view(-1, width) for name, value in values.items()},
        )

    def start(self, piece: Piece, entries: Entries) -> None:
        """Train exactly `entries` of `piece` from the next update on.

        With "drop" all start from zero. Else those whose state is held go on with it, and the others start; what is
        held of the piece beyond `entries` is dropped ("keep") or parked ("offload").
        """
        held = self.active.pop(piece.key, [])
        if self._policy == "drop":
            held.clear()  # freed before anything is allocated
            self.active[piece.key] = [self._new(piece, entries)]
        elif entries.is_all and len(held) == 1 and held[0].entries.is_all:
            self.active[piece.key] = held
        else:
            self.active[piece.key] = list(self._divided(piece, entries, held))

    def _divided(self, piece: Piece, entries: Entries, held: list[Record]) -> Iterator[Record]:
        """Records that make up `entries`: one for each counter there is, then a new one; what is left over stops."""
        device = self.weight(piece).device
        pools = [*map(self._pool_of, held), *self._parked_pools(piece.key)]
        held.clear()
        if not pools:
            yield self._new(piece, entries)
            return
        pool = Pool.merged(pools, torch.device("cpu") if self._policy == "offload" else device)
        pools.clear()
        if entries.unit == "entry" and not entries.is_all:
            pool = pool.by_entry()
        # Where single entries have state, rows are of no use; those of a vector are its entries.
        unit: Unit = "row" if pool.width > 1 else "entry"
        wanted = entries.units(device, unit)
        chosen = pool.among(wanted)
        if self._policy == "offload" and not chosen.all():
            self._park(piece.key, [pool.part(~chosen)])
        for counter, part in pool.part(chosen).by_counter().items():
            yield self._record(piece, Entries.of(part.units.to(device), piece.shape, unit), part, counter)
        unknown = ~positions_within(wanted, pool.units.to(device))
        if unknown.any():
            yield self._new(piece, Entries.of(wanted[unknown], piece.shape, unit))

    def _record(self, piece: Piece, entries: Entries, pool: Pool, counter: int) -> Record:
        device = self.weight(piece).device
        values = {name: value.reshape(-1).to(device) for name, value in pool.values.items()}
        master = values.pop(MASTER, None)
        if self._weights_move or master is None:
            master = self._master(piece, entries)
        return Record(piece, self._serial(), entries, values, counter, master)

    def _new(self, piece: Piece, entries: Entries) -> Record:
        weight = self.weight(piece)
        slots = {
            slot: torch.zeros(entries.count, dtype=self._precision.moments, device=weight.device)
            for slot in self._rule.slots
        }
        return Record(piece, self._serial(), entries, slots, master=self._master(piece, entries))

    def _serial(self) -> int:
        self._records_made += 1
        return self._records_made

    def _master(self, piece: Piece, entries: Entries) -> Tensor | None:
        if not self._precision.has_master:
            return None
        return entries.gather(self.weight(piece)).to(torch.float32, copy=True)

    @torch.no_grad()
    def update(
        self,
        gradients: Mapping[str, Tensor],
        rate_of: Callable[[str], float],
        step: int,
        *,
        count_unchanged: bool = False,
    ) -> Tensor | None:
        """Apply the rule once to every record that has a gradient; the counters of these go on by one.

        Args:
            gradients: record key -> gradient of its entries, 1-D or in the piece's shape; may be overwritten.
            rate_of: learning rate of a parameter.
            step: number of the update, which keys the draws of stochastic rounding.
            count_unchanged: compare bf16 weights with their former values.

        Returns:
            As `DenseState.update`.
        """
        trained: list[Record] = []
        counters: list[tuple[float, int]] = []
        for record in self.records():
            if record.key in gradients:
                record.counter += 1
                trained.append(record)
                counters.append((rate_of(record.piece.parameter), record.counter))
        if self._triton is not None:
            targets, values = [self._target(each) for each in trained], [gradients[each.key] for each in trained]
            return self._triton.update(targets, values, counters, step, count_unchanged=count_unchanged)
        groups: dict[tuple[float, int], list[Record]] = {}
        for record, group in zip(trained, counters, strict=True):
            groups.setdefault(group, []).append(record)
        changed: list[Tensor] = []
        entries = 0
        for (rate, counter), records in groups.items():
            stored = [self._stored(record, gradients[record.key]) for record in records]
            changed += self._stored_rule.apply(
                stored, lr=rate, step=counter, draw=step, count_unchanged=count_unchanged
            )
            entries += sum(record.entries.count for record in records)
        return 1.0 - torch.stack(changed).sum() / entries if changed else None

    def _target(self, record: Record) -> Target:
        if record.target is None:
            piece, slots = record.piece, tuple(record.slots[slot] for slot in self._rule.slots)
            start = 0 if piece.rows is None else piece.rows[0] * prod(piece.shape[1:])
            weight = self.weight(piece)
            record.target = Target(piece.parameter, start, weight, record.entries, slots, record.master)
        return record.target

    def _stored(self, record: Record, gradient: Tensor) -> Stored:
        if gradient.numel() != record.entries.count:  # the kernels do not look
            raise ValueError(f"{record.key} has {record.entries.count} entries, its gradient {gradient.numel()}")
        slots = tuple(record.slots[slot] for slot in self._rule.slots)
        weight, gradient = self.weight(record.piece), gradient.reshape(-1)
        if record.entries.is_all:
            return Stored(record.piece.key, weight.view(-1), gradient, slots, record.master)
        return Stored(record.key, weight, gradient, slots, record.master, record.entries)

    def held(self) -> Iterator[tuple[str, Category, Tensor]]:
        """Every tensor of the state with a name of its own and its category."""
        for record in self.records():
            for slot, tensor in record.slots.items():
                yield f"{record.key}.{slot}", "optimizer_state", tensor
            if record.entries.index is not None:
                yield f"{record.key}.index", "indices", record.entries.index
            if record.master is not None:
                yield f"{record.key}.{MASTER}", "master_weights", record.master
        for key, pool in self.parked.items():
            for name, tensor in pool.values.items():
                yield f"{key}@parked.{name}", "master_weights" if name == MASTER else "optimizer_state", tensor
            yield f"{key}@parked.units", "indices", pool.units
            yield f"{key}@parked.counters", "indices", pool.counters

    @property
    def first_moment_entries(self) -> int:
        """Elements of the first state tensor of all records, parked ones too; 0 for a rule without state."""
        if not self._rule.slots:
            return 0
        parked = sum(pool.values[self._rule.slots[0]].numel() for pool in self.parked.values())
        return self.entries + parked

    def active_entries(self, keys: Iterable[str]) -> int:
        """Entries trained of the pieces with these keys."""
        return sum(record.entries.count for key in keys for record in self.active.get(key, []))

    @property
    def entries(self) -> int:
        """Entries trained of all pieces."""
        return self.active_entries(self.active)

    def state_dict(self) -> dict[str, Any]:
        """Tensors under the names of `held`, and `records`, the plain values that say what they are."""
        described = [
            {
                "parameter": record.piece.parameter,
                "shape": list(record.piece.shape),
                "rows": list(record.piece.rows) if record.piece.rows else None,
                "serial": record.serial,
                "counter": record.counter,
                "entries": record.entries.state(),
            }
            for record in self.records()
        ]
        parked = {key: pool.width for key, pool in self.parked.items()}
        made = {"records": described, "parked": parked, "records_made": self._records_made}
        return {**made, **{name: tensor for name, _, tensor in self.held()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put `state` back; the weights must be attached and are read for nothing but their device.

        Raises:
            InputError: a value is missing, unexpected, or not of the shape or dtype that the plain values speak of. The
                state is of no further use then.
        """
        missing = sorted({"records", "parked", "records_made"} - state.keys())
        if missing:
            raise InputError(_what_differs(missing, []))
        self.active.clear()
        self.parked.clear()
        self._records_made = state["records_made"]
        remaining = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        for saved in state["records"]:
            record = self._restored(saved, state)
            self.active.setdefault(record.piece.key, []).append(record)
        for key, width in state["parked"].items():
            self.parked[key] = self._restored_pool(key, width, state)
        missing = sorted(name for name, _, _ in self.held() if name not in remaining)
        extra = sorted(remaining.keys() - {name for name, _, _ in self.held()})
        if missing or extra:
            raise InputError(_what_differs(missing, extra))

    def _restored(self, saved: Mapping[str, Any], state: Mapping[str, Any]) -> Record:
        rows = tuple(saved["rows"]) if saved["rows"] else None
        piece = Piece(saved["parameter"], tuple(saved["shape"]), rows)
        if piece.parameter not in self._weights or self.weight(piece).shape != piece.shape:
            raise InputError(f"the state to load is of {piece.key} with shape {piece.shape}: the model has none such")
        device, name = self.weight(piece).device, f"{piece.key}@{saved['serial']}"
        stored = Entries.stored_index(saved["entries"])
        index = None if stored is None else _saved(state, f"{name}.index", *stored).to(device, copy=True)
        entries = Entries.restore(saved["entries"], index)
        slots = {}
        for slot in self._rule.slots:
            slots[slot] = _saved(state, f"{name}.{slot}", (entries.count,), self._precision.moments)
        master = None
        if self._precision.has_master:
            master = _saved(state, f"{name}.{MASTER}", (entries.count,), torch.float32).to(device, copy=True)
        slots = {slot: values.to(device, copy=True) for slot, values in slots.items()}
        return Record(piece, saved["serial"], entries, slots, saved["counter"], master)

    def _restored_pool(self, key: str, width: int, state: Mapping[str, Any]) -> Pool:
        units = _saved(state, f"{key}@parked.units")
        counters = _saved(state, f"{key}@parked.counters", tuple(units.shape), torch.int32)
        wanted = dict.fromkeys(self._rule.slots, self._precision.moments)
        if self._precision.has_master:
            wanted[MASTER] = torch.float32
        values = {
            name: _saved(state, f"{key}@parked.{name}", (units.numel(), width), dtype).clone()
            for name, dtype in wanted.items()
        }
        return Pool(width, units.clone(), counters.clone(), values)


def _saved(
    state: Mapping[str, Any], name: str, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The tensor `name` of a saved state, of `shape` and `dtype` if they are given."""
    if not isinstance(state.get(name), Tensor):
        raise InputError(_what_differs([name], []))
    found: Tensor = state[name]
    if shape is not None and (tuple(found.shape) != shape or found.dtype != dtype):
        raise InputError(
            f"{name}: the state to load is {tuple(found.shape)} {found.dtype}, the run needs {shape} {dtype}"
        )
    return found


def _what_differs(missing: list[str], extra: list[str]) -> str:
    what = f"has no {missing[0]!r}" if missing else f"has {extra[0]!r}, which this method does not hold"
    return f"the optimizer state to load {what} ({len(missing)} missing, {len(extra)} unexpected)"
