"""The [method] table of `blockllm`: options, what each variant sets, and which combinations mean nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from blockllm_cli.methods.dense import AdamOptions

PAPER: Mapping[str, Any] = {
    "mask": "entry",
    "norms": "compete",
    "always": (),
    "max_interval": 0,
    "probe_every": 1,
}
"""What variant "paper" sets where the recipe is silent."""

RELEASED = ("variant", "sparsity", "patience", "probe", "probe_every", "update_freq", "betas", "eps", "weight_decay")
"""Keys of variant "official": those of the released configuration class, under the names used here."""

OFFICIAL: Mapping[str, Any] = {"probe_every": 20, "update_freq": 1000}


class BlockLLMOptions(AdamOptions):
    """Options of `blockllm`; the defaults are those of variant "recommended"."""

    variant: Literal["recommended", "paper", "official"] = Field(
        default="recommended",
        description="Which defaults hold. recommended: those listed here; paper: mask entry, norms compete, nothing "
        "always trained, no max_interval, a probe every update; official: the released class; it ignores eps and "
        "weight_decay, and keys that it lacks are refused.",
    )
    sparsity: float = Field(
        default=0.9,
        ge=0.0,
        lt=1.0,
        description="Share of the candidates' entries that have no state: floor((1 - sparsity) n) of n entries do.",
    )
    mask: Literal["none", "entry", "row"] = Field(
        default="none",
        description="What is trained of a selected block: all of it (none), the entries (entry) or the rows (row) with "
        "the largest gradient.",
    )
    density: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Largest share of a selected block that a mask keeps; smaller values spread the budget over more "
        "blocks. In (0, 1].",
    )
    granularity: Literal["tensor", "layer"] = Field(
        default="tensor", description="What a block is: one parameter tensor, or all candidates of one decoder layer."
    )
    groups: tuple[str, ...] = Field(
        default=(),
        description="Regular expressions; the candidates that one finds are one block. Those of none stay by "
        "themselves.",
    )
    score: Literal["norm", "rms", "random", "cyclic"] = Field(
        default="norm",
        description="What orders the blocks: gradient norm (norm) or its root mean square (rms) over visit frequency, "
        "chance (random), or turns (cyclic).",
    )
    patience: int = Field(
        default=100,
        ge=1,
        description="Selection when the newest loss is not below the mean of this many newest losses. In updates.",
    )
    min_interval: int = Field(default=0, ge=0, description="Fewest updates between two selections by patience.")
    max_interval: int = Field(
        default=500, ge=0, description="A selection comes after this many updates at the latest; 0 is never."
    )
    probe: int = Field(
        default=1, ge=0, description="Blocks not trained whole whose gradient norm is estimated in one probing update."
    )
    probe_every: int = Field(
        default=0,
        ge=0,
        description="Updates from one probing update to the next. 0: ceil(34 probe / blocks), under 1 % of the "
        "products.",
    )
    always: tuple[str, ...] = Field(
        default=("embedding", "head"),
        description="Roles (embedding, head, norm, attention, mlp) or regular expressions of parameters that always "
        "train, with dense state; they are no candidates.",
    )
    norms: Literal["with_layer", "always", "compete"] = Field(
        default="with_layer",
        description="Norms train while a tensor of their layer does (with_layer), always, or as blocks among the "
        "others (compete).",
    )
    state: Literal["drop", "keep", "offload"] = Field(
        default="drop",
        description="Moments at a selection: all start from zero (drop), entries selected again go on with theirs "
        "(keep), or the others' wait in host memory (offload).",
    )
    inactive: Literal["none", "sign", "normalized"] = Field(
        default="none",
        description="Rule without state for the candidates' other entries: none, the sign of the gradient, or the "
        "gradient over its root mean square.",
    )
    inactive_scale: float = Field(
        default=1.0, gt=0.0, description="Factor on the learning rate of the inactive rule; above 0."
    )
    layerwise: bool | None = Field(
        default=None,
        description="Whether the inactive rule is applied inside the backward pass, block by block, so that no "
        "gradient is kept for it. Absent: wherever that is possible (one micro-batch per update, on_nonfinite stop).",
    )
    update_freq: int | None = Field(
        default=None, ge=1, description="Variant official only: a selection can come at multiples of this many updates."
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0.0,
        description="Decoupled decay of the entries that have state; at least 0.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_variant(cls, given: Any) -> Any:
        """Put in what the variant sets, where the recipe is silent; refuse what the release does not have."""
        if not isinstance(given, Mapping):
            return given
        variant = given.get("variant", "recommended")
        if variant == "official":
            foreign = [key for key in given if key not in RELEASED and key in cls.model_fields]
            if foreign:
                raise ValueError(
                    f'variant "official" has no {foreign[0]}: the release knows {", ".join(RELEASED[1:])} only'
                )
        filled = {**{"paper": PAPER, "official": OFFICIAL}.get(str(variant), {}), **given}
        # What a validator returns is no longer JSON to pydantic, and strict checks then take tuples for tuples only.
        return {key: tuple(value) if isinstance(value, list) else value for key, value in filled.items()}

    @field_validator("always", "groups")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if not pattern:
                raise ValueError("an empty expression finds everything; name what is meant")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return patterns

    @model_validator(mode="after")
    def _mean_something(self) -> Self:
        """Refuse values that would have no effect."""
        if self.mask == "none" and self.density != 1.0:
            raise ValueError('density has no effect with mask = "none"; set mask = "entry" or "row"')
        if self.inactive == "none" and self.inactive_scale != 1.0:
            raise ValueError(
                'inactive_scale has no effect with inactive = "none"; set inactive = "normalized" or "sign"'
            )
        if self.inactive == "none" and self.layerwise:
            raise ValueError(
                'layerwise has no effect with inactive = "none": only that rule is applied in the backward pass'
            )
        if self.groups and self.granularity == "layer":
            raise ValueError('groups and granularity = "layer" both say what a block is; leave one out')
        if 0 < self.max_interval < self.min_interval:
            raise ValueError(f"max_interval = {self.max_interval} is below min_interval = {self.min_interval}")
        if self.update_freq is not None and self.variant != "official":
            raise ValueError('update_freq belongs to variant = "official"; set max_interval or min_interval')
        return self

    @model_serializer(mode="wrap")
    def _own_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Variant official is written with the keys it knows, so that what was written can be read again."""
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if self.variant != "official" or key in RELEASED}
