"""Upper bounds of what BlockLLM holds, per category, before anything is selected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from math import prod

import torch

from blockllm_cli.footprint import ELEMENT_BYTES, Category, TensorPlan
from blockllm_cli.gradients.sketch import sketch_bytes
from blockllm_cli.methods.blockllm.layout import Layout
from blockllm_cli.methods.blockllm.options import BlockLLMOptions
from blockllm_cli.optim.blocks import Piece
from blockllm_cli.optim.precision import Precision

MOMENTS = ("exp_avg", "exp_avg_sq")


def plan_tensors(
    layout: Layout, options: BlockLLMOptions, precision: Precision, accumulator: torch.dtype, *, is_layerwise: bool
) -> list[TensorPlan]:
    """What may be held at most; tensors of the candidates stand together under the name `candidates`.

    Args:
        layout: how the model is divided.
        options: of the method.
        precision: dtypes of state and master copies.
        accumulator: dtype of kept gradients.
        is_layerwise: whether the inactive rule writes inside the backward pass.
    """
    always = {piece.key: piece.shape for piece in layout.always}
    riders = {name: layout.shapes[name] for name in layout.riders}
    named = {**always, **riders}
    entries = min(layout.budget, layout.candidates)
    plans = [TensorPlan(name, "gradients", shape, _word(accumulator), "update") for name, shape in named.items()]
    plans += _gradients(layout, options, _word(accumulator), is_layerwise=is_layerwise)
    state = _state_entries(layout, options, entries)
    for slot in MOMENTS:
        plans += [
            _state(f"{name}.{slot}", "optimizer_state", shape, precision.moments) for name, shape in named.items()
        ]
        plans.append(_state(f"candidates.{slot}", "optimizer_state", (state,), precision.moments))
    if precision.has_master:
        plans += [_state(f"{name}.master", "master_weights", shape, torch.float32) for name, shape in named.items()]
        plans.append(_state("candidates.master", "master_weights", (state,), torch.float32))
    index_bytes = 0 if layout.nothing_to_choose else _index_bytes(layout, options, entries)
    if index_bytes:
        plans.append(_state("candidates.index", "indices", (index_bytes,), torch.uint8))
    return plans


def _state_entries(layout: Layout, options: BlockLLMOptions, entries: int) -> int:
    """Candidates' entries with state at most, those that wait or are parked included."""
    if layout.nothing_to_choose or options.state == "drop":
        return entries
    if options.state == "offload":
        return layout.candidates
    # Blocks that are selected again and wait to enter keep what they had beside what has entered.
    return entries if options.mask == "none" else min(2 * entries, layout.candidates)


def _index_bytes(layout: Layout, options: BlockLLMOptions, entries: int) -> int:
    """Bytes of indices at most: 4 for each kept entry or row, or a bit for each there is; 8 for each parked one."""
    pieces = [piece for block in layout.blocks for piece in block.pieces]
    # Of pieces that are whole, rows are counted.
    units = [piece.size if options.mask == "entry" else piece.shape[0] for piece in pieces]
    narrowest = min(prod(piece.shape[1:]) for piece in pieces) if options.mask == "row" else 1
    active = 0 if options.mask == "none" else 4 * (entries // narrowest)
    if options.state == "drop":
        return min(active, sum(-(-count // 8) for count in units))
    if options.state == "keep":
        return 2 * active
    riders = sum(prod(layout.shapes[name]) for name in layout.riders)
    return active + 8 * (sum(units) + riders)


def _gradients(layout: Layout, options: BlockLLMOptions, dtype: str, *, is_layerwise: bool) -> Iterator[TensorPlan]:
    """Kept gradients of the candidates, those of the update that chooses masks, sketches, the inactive rule's."""
    kept = min(layout.budget, layout.candidates)
    largest = max((block.size for block in layout.blocks), default=0)
    held = kept
    if options.mask != "none" and not layout.nothing_to_choose:
        held += max(kept, largest)
    if options.inactive != "none" and not is_layerwise and not layout.nothing_to_choose:
        held += layout.candidates
    yield TensorPlan("candidates", "gradients", (held,), dtype, "update")
    if layout.nothing_to_choose or options.score in ("random", "cyclic"):
        return
    sketches = [sum(sketch_bytes(piece.size) for piece in block.pieces) for block in layout.blocks]
    probes = 0 if options.inactive != "none" else sum(sorted(sketches, reverse=True)[: options.probe])
    if probes:
        yield TensorPlan("probes", "gradients", (probes,), "uint8", "pass")
    named = chain((piece.size for piece in layout.always), (prod(layout.shapes[name]) for name in layout.riders))
    beside = (held + sum(named)) * ELEMENT_BYTES[dtype] + probes
    # The scouting pass has sketches of all blocks and nothing else.
    excess = sum(sketches) - beside
    if excess > 0:
        yield TensorPlan("scouting", "gradients", (excess,), "uint8", "pass")


def _state(name: str, category: Category, shape: tuple[int, ...], dtype: torch.dtype) -> TensorPlan:
    return TensorPlan(name, category, shape, _word(dtype))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plan_selection(
    layout: Layout,
    precision: Precision,
    accumulator: torch.dtype,
    kept: Mapping[str, tuple[Piece, int, int]],
) -> list[TensorPlan]:
    """What is held once a selection has entered, exact to the byte where all its entries started together.

    Args:
        layout: how the model is divided.
        precision: dtypes of state and master copies.
        accumulator: dtype of kept gradients.
        kept: piece key -> (piece, units kept, entries of a unit); a unit is an entry or a row.
    """
    parameters = frozenset(piece.parameter for piece, _, _ in kept.values())
    whole = {piece.key: piece.size for piece in [*layout.always, *layout.rider_pieces(parameters)]}
    entries = {key: units * width for key, (_, units, width) in kept.items()}
    plans = []
    for key, count in {**whole, **entries}.items():
        plans.append(TensorPlan(key, "gradients", (count,), _word(accumulator), "update"))
        plans += [_state(f"{key}.{slot}", "optimizer_state", (count,), precision.moments) for slot in MOMENTS]
        if precision.has_master:
            plans.append(_state(f"{key}.master", "master_weights", (count,), torch.float32))
    for key, (piece, units, width) in kept.items():
        there = piece.size // width
        if units < there:
            smaller = min(-(-there // 8), 4 * units)
            plans.append(_state(f"{key}.index", "indices", (smaller,), torch.uint8))
    return plans
