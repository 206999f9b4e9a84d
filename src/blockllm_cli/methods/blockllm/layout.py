"""Which tensors of a model compete for the budget, which always train, which ride along; and the blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor, prod

from blockllm_cli.errors import RecipeError
from blockllm_cli.methods.blockllm.options import BlockLLMOptions
from blockllm_cli.model.roles import ROLES, layer_of, role_of
from blockllm_cli.optim.blocks import Block, Piece, cut_blocks
from blockllm_cli.optim.selection import budget, exact

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """How the options divide a model.

    Attributes:
        always: pieces that always train, whole.
        riders: norm that rides -> the parameters whose training takes it along.
        blocks: the candidates, in the order of the model's parameters.
        shapes: of all parameters.
        candidates: elements of all blocks.
        budget: elements that may have state at one time.
        nothing_to_choose: the budget covers every candidate, whole: all of them train from the first update.
    """

    always: tuple[Piece, ...]
    riders: Mapping[str, frozenset[str]]
    blocks: tuple[Block, ...]
    shapes: Shapes
    candidates: int
    budget: int
    nothing_to_choose: bool

    def rider_pieces(self, parameters: frozenset[str]) -> list[Piece]:
        """The norms that train along with `parameters`."""
        return [Piece(name, self.shapes[name]) for name, with_ in self.riders.items() if with_ & parameters]


def lay_out(shapes: Shapes, options: BlockLLMOptions) -> Layout:
    """Divide the parameters of `shapes` (in the model's order) as `options` say.

    Raises:
        RecipeError: an expression of `always` or `groups` finds nothing, or no block fits into the budget.
    """
    always = {name for name in shapes if _is_always(name, options)}
    for pattern in options.always:
        # A role may be absent, as the head is where embeddings are tied; an expression that finds nothing is a mistake.
        if pattern not in ROLES and not any(_matches(pattern, name) for name in shapes):
            raise RecipeError(f"method.always: {pattern!r} finds no parameter; the model's are {', '.join(shapes)}")
    riders = _riders(shapes, always, options)
    competing = {name: shape for name, shape in shapes.items() if name not in always and name not in riders}
    # A norm rides with what always trains too, so it always trains then.
    always |= {name for name, with_ in riders.items() if with_ & always}
    riders = {name: with_ for name, with_ in riders.items() if name not in always}
    candidates = sum(prod(shape) for shape in competing.values())
    entries = budget(candidates, options.sparsity)
    blocks = _blocks(competing, entries, options)
    whole = entries >= candidates and (options.mask == "none" or options.density == 1.0)
    if not blocks:
        raise RecipeError("method.always names every parameter, so there is nothing to select; take method adamw")
    if not whole and not any(_fits(block, entries, options) for block in blocks):
        smallest = min(blocks, key=lambda block: block.size)
        raise RecipeError(
            f"method.sparsity = {options.sparsity:g}: the budget is {entries} of {candidates} entries, and the "
            f"smallest block, {smallest.name}, has {smallest.size}, of which less than "
            + ("all" if options.mask == "none" else f"one {options.mask}")
            + " would be kept; lower sparsity"
            + (', or set mask = "entry"' if options.mask == "none" else ", or raise density")
        )
    return Layout(
        always=tuple(Piece(name, shape) for name, shape in shapes.items() if name in always),
        riders=riders,
        blocks=blocks,
        shapes=dict(shapes),
        candidates=candidates,
        budget=entries,
        nothing_to_choose=whole,
    )


def _matches(pattern: str, name: str) -> bool:
    return pattern == role_of(name) or re.search(pattern, name) is not None


def _is_always(name: str, options: BlockLLMOptions) -> bool:
    if role_of(name) == "norm" and options.norms == "always":
        return True
    return any(_matches(pattern, name) for pattern in options.always)


def _riders(shapes: Shapes, always: set[str], options: BlockLLMOptions) -> dict[str, frozenset[str]]:
    """Norms that train with others: those of a layer with its tensors, the final norm with the head."""
    if options.norms != "with_layer":
        return {}
    head = "lm_head.weight" if "lm_head.weight" in shapes else "model.embed_tokens.weight"
    riders = {}
    for name in shapes:
        if role_of(name) != "norm" or name in always:
            continue
        layer = layer_of(name)
        if layer is None:
            riders[name] = frozenset({head})
        else:
            riders[name] = frozenset(other for other in shapes if layer_of(other) == layer and role_of(other) != "norm")
    return riders


def _blocks(competing: Shapes, entries: int, options: BlockLLMOptions) -> tuple[Block, ...]:
    try:
        return tuple(
            cut_blocks(
                competing,
                budget=entries,
                granularity=options.granularity,
                groups=options.groups,
                layer_of=layer_of,
            )
        )
    except ValueError as error:
        raise RecipeError(f"method.groups: {error}") from error


def _fits(block: Block, entries: int, options: BlockLLMOptions) -> bool:
    """Whether something of the block could be trained within `entries`."""
    if options.mask == "none":
        return block.size <= entries
    share = min(exact(options.density), Fraction(entries, block.size))
    units = [piece.shape[0] if options.mask == "row" else piece.size for piece in block.pieces]
    return any(floor(share * count) > 0 for count in units)
