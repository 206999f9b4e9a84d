"""BlockLLM against the second implementation in tests/reference, and that one against what it must be.

What differs between the two is rounding: the reference takes the whole batch at once, full logits and float64 norms.
Weights are compared after every update to `TOLERANCE`; the choices (causes, blocks, counts, visits, entries) exactly.
A decision that rounding could turn over would make that a matter of luck: the reference notes how close each was, the
cases hold none that is close, and a test says so. Adam's eps is 1e-6, so that the step of an entry whose gradient is
rounding noise (1e-9) is a thousandth of the rate, not the rate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any, NamedTuple

import pytest
import torch

from blockllm_cli.gradients.sketch import signs
from blockllm_cli.methods.base import Rates
from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.llama import build_model
from blockllm_cli.optim.selection import at_random
from reference.blockllm_reference import Margin, Outcome, Reference
from support.methods import Driven, drive_update, make_method, toy_batch

TOLERANCE = 1e-5
CLOSE = {"order": 1e-5, "patience": 1e-5, "mask": 1e-5, "sign": 1e-8}
SEED = 11

GROUPS = [r"model\.layers\.\d+\.self_attn\.(q|k)_proj\.weight", r"model\.layers\.1\.mlp\.\w+\.weight"]
ALWAYS = {
    "usual": ["embedding", "head"],
    "nothing": [],
    "regex": ["embedding", r"model\.layers\.0\.self_attn\.o_proj\.weight"],
}
INTERVALS = {
    "patient": {"patience": 5, "max_interval": 9, "probe_every": 1},
    "hasty": {"patience": 2, "min_interval": 4, "max_interval": 0, "probe": 2, "probe_every": 3},
    "late": {"patience": 12, "max_interval": 7, "probe": 3, "probe_every": 2},
    "usual": {"patience": 4, "min_interval": 2, "max_interval": 11},
}


class Case(NamedTuple):
    granularity: str
    mask: str
    density: float
    sparsity: float
    score: str
    state: str
    inactive: str
    norms: str
    always: str
    intervals: str
    micro_batches: int = 1
    clip: float = 0.0
    weight_decay: float = 0.0

    @property
    def options(self) -> dict[str, Any]:
        options = self._asdict()
        del options["micro_batches"], options["clip"]
        options |= INTERVALS[options.pop("intervals")] | {"always": ALWAYS[self.always]}
        if self.granularity == "groups":
            options |= {"granularity": "tensor", "groups": GROUPS}
        if self.inactive != "none":
            options["inactive_scale"] = 0.3
        return options | {"betas": (0.9, 0.99), "eps": 1e-4}


CASES = [
    Case("groups", "row", 1.0, 0.6, "cyclic", "drop", "none", "compete", "regex", "patient", 3, 0.0, 0.1),
    Case("groups", "entry", 0.4, 0.9, "random", "keep", "sign", "always", "nothing", "hasty", 1),
    Case("layer", "row", 0.4, 0.95, "norm", "offload", "normalized", "with_layer", "usual", "patient", 2, 0.2),
    Case("tensor", "none", 1.0, 0.8, "rms", "drop", "sign", "always", "usual", "usual", 1, 0.0, 0.1),
    Case("layer", "none", 1.0, 0.9, "rms", "keep", "none", "with_layer", "regex", "late", 3),
    Case("tensor", "entry", 0.4, 0.6, "rms", "offload", "normalized", "compete", "nothing", "hasty", 1),
    Case("layer", "entry", 0.4, 0.8, "cyclic", "drop", "none", "with_layer", "nothing", "late", 2),
    Case("groups", "none", 1.0, 0.95, "random", "offload", "normalized", "always", "regex", "patient", 1, 0.0, 0.1),
    Case("tensor", "row", 0.4, 0.8, "norm", "keep", "sign", "compete", "regex", "usual", 2),
    Case("tensor", "entry", 1.0, 0.95, "random", "keep", "none", "compete", "usual", "late", 1, 0.2),
    Case("layer", "none", 1.0, 0.6, "norm", "keep", "none", "always", "nothing", "hasty", 1),
    Case("tensor", "row", 1.0, 0.9, "cyclic", "offload", "sign", "always", "usual", "patient", 3, 0.0, 0.1),
    Case("layer", "row", 1.0, 0.6, "random", "drop", "sign", "with_layer", "usual", "usual", 1, 0.2),
    Case("groups", "entry", 1.0, 0.9, "norm", "drop", "normalized", "compete", "regex", "late", 2),
    Case("layer", "none", 1.0, 0.95, "cyclic", "keep", "normalized", "compete", "nothing", "usual", 1),
    Case("groups", "row", 1.0, 0.8, "rms", "offload", "normalized", "with_layer", "usual", "hasty", 1, 0.2, 0.1),
    Case("tensor", "row", 1.0, 0.95, "rms", "drop", "sign", "with_layer", "nothing", "patient", 2),
    Case("groups", "row", 0.4, 0.8, "random", "offload", "none", "compete", "usual", "late", 1),
]
"""Every pair of values of the first nine columns, but for a density without a mask."""

MORE = [
    Case("tensor", "entry", 0.4, 0.0, "norm", "keep", "none", "with_layer", "usual", "patient", 2),
    Case("tensor", "none", 1.0, 0.0, "norm", "drop", "none", "with_layer", "nothing", "patient", 1, 0.2, 0.1),
    Case("layer", "none", 1.0, 0.6, "norm", "offload", "none", "with_layer", "usual", "hasty", 1),
    Case("tensor", "entry", 1.0, 0.9, "norm", "offload", "none", "with_layer", "nothing", "patient", 1, 0.2),
    Case("tensor", "entry", 0.4, 0.8, "rms", "keep", "none", "with_layer", "usual", "hasty", 2, 0.0, 0.1),
]
"""Budgets that cover everything, and what the pairs leave out of probing, waves and state together."""


def rates_at(step: int) -> Rates:
    return Rates(body=4e-3 * min(step / 8, 1.0), dense=6e-3 * min(step / 8, 1.0))


def tiny_model(*, tied: bool = False):
    """Three layers whose MLP tensors are larger than a sketch, so that its signs matter."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.1,
        tie_word_embeddings=tied,
    )
    return build_model(config, seed=3, dtype=torch.float32, device=torch.device("cpu"))


def make_reference(model, options, clip: float = 0.0) -> Reference:
    return Reference(
        model,
        options,
        seed=SEED,
        rates=lambda step: (rates_at(step).body, rates_at(step).dense),
        clip=clip,
        signs=signs,
        permutation=lambda names, number: at_random(names, SEED, number),
    )


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def selection_of(driven: Driven, step: int) -> dict[str, Any] | None:
    """The selection among the events, in the words of the reference."""
    events = [event for event in driven.events if event["kind"] == "selection"]
    if not events:
        return None
    (event,) = events
    if event["cause"] == "all":  # nothing to choose: an announcement, not a selection
        assert step == 1
        return None
    blocks = event["blocks"]
    return {
        "number": event["number"],
        "cause": event["cause"],
        "blocks": [block["name"] for block in blocks],
        "sizes": [block["size"] for block in blocks],
        "kept": [block["kept"] for block in blocks],
        "enters": [block["enters"] for block in blocks],
        "ages": [block["age"] for block in blocks],
        "scores": [block["score"] for block in blocks],
        "visits": {block["name"]: block["visits"] for block in blocks + event["others"]},
    }


@dataclass
class Duel:
    """The method and the reference, each on a model of its own, driven over the same batches."""

    case: Case
    tied: bool = False
    worst: float = 0.0
    selections: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model, self.other = tiny_model(tied=self.tied), tiny_model(tied=self.tied)
        case = self.case
        self.method = make_method("blockllm", seed=SEED, micro_batches=case.micro_batches, **case.options)
        self.method.prepare(self.model)
        self.reference = make_reference(self.other, case.options, case.clip)

    def update(self, step: int, *, carried_out: bool = True) -> None:
        before = weights_of(self.model)
        expected = self.reference.update(step, toy_batch(step), carried_out=carried_out)
        driven = drive_update(
            self.method,
            self.model,
            step,
            rates_at(step),
            micro_batches=self.case.micro_batches,
            clip=self.case.clip,
            carried_out=carried_out,
        )
        assert driven.loss == pytest.approx(expected.loss, rel=1e-5), self.where(step)
        if not carried_out:
            return
        self._compare_selections(step, driven, expected)
        assert driven.norm == pytest.approx(expected.kept_norm, rel=1e-4), self.where(step)
        self._compare_entries(step, before, expected)
        self._compare_weights(step)

    def _compare_selections(self, step: int, driven: Driven, expected: Outcome) -> None:
        actual, wanted = selection_of(driven, step), expected.selection
        assert (actual is None) == (wanted is None), self.where(step)
        if wanted is None:
            return
        self.selections.append(wanted)
        if wanted["scores"] is not None:
            assert actual["scores"] == pytest.approx(wanted["scores"], rel=1e-4), self.where(step)
        for key in wanted.keys() - {"scores"}:
            if wanted[key] is not None:
                assert actual[key] == wanted[key], f"{key}: {self.where(step)}"

    def _compare_entries(self, step: int, before: dict[str, torch.Tensor], expected: Outcome) -> None:
        """Where Adam trains, and nowhere else, weights move; what moves by the other rule the weights tell."""
        assert self.method.state_entries == self.reference.state_entries, self.where(step)
        if self.case.inactive != "none":
            return
        for name, weight in self.model.named_parameters():
            moved = weight.detach() != before[name]
            must = expected.trained[name] & ((self.other.get_parameter(name) - before[name]).abs() > 1e-6)
            assert not (moved & ~expected.trained[name]).any(), f"{name} moved where it may not: {self.where(step)}"
            assert moved[must].all(), f"{name} did not move where it must: {self.where(step)}"

    def _compare_weights(self, step: int) -> None:
        for name, weight in self.model.named_parameters():
            gap = float((weight - self.other.get_parameter(name)).detach().abs().max())
            self.worst = max(self.worst, gap)
            assert gap < TOLERANCE, f"{name} differs by {gap:.1e}: {self.where(step)}"

    def where(self, step: int) -> str:
        """What a failure says: the update, and the decisions before it that rounding might have turned over."""
        close = [margin for margin in self.reference.margins if margin.gap < 10 * CLOSE[margin.kind]]
        return f"update {step}; close decisions up to here, each perhaps a flip: {close or 'none, so this is no flip'}"


@pytest.mark.parametrize("case", CASES + MORE, ids=lambda case: "-".join(map(str, case[:10])))
def test_agrees_over_60_updates(case):
    duel = Duel(case)
    for step in range(1, 61):
        duel.update(step)
    nothing_to_choose = case.sparsity == 0.0 and case.density == 1.0
    assert len(duel.selections) == 0 if nothing_to_choose else len(duel.selections) >= 5
    assert_nothing_close(duel.reference.margins)


def assert_nothing_close(margins: list[Margin]) -> None:
    close = [margin for margin in margins if margin.gap < CLOSE[margin.kind]]
    assert not close, f"rounding may turn these over; take another case: {close}"


@pytest.mark.slow
@pytest.mark.parametrize("case", [MORE[3], CASES[2]], ids=["offload-probes", "rows-inactive"])
def test_agrees_over_200_updates(case):
    duel = Duel(case)
    for step in range(1, 201):
        duel.update(step)
    assert len(duel.selections) >= 15
    assert_nothing_close(duel.reference.margins)


def test_agrees_with_tied_embeddings_that_compete():
    """The final norm rides with the one tensor that is embedding and head."""
    duel = Duel(CASES[6], tied=True)
    for step in range(1, 41):
        duel.update(step)


def test_an_update_that_is_given_up_changes_nothing():
    """Neither the first, which scouts and selects, nor later ones that select, let blocks enter or probe."""
    duel = Duel(MORE[4])
    for step in range(1, 61):
        duel.update(step, carried_out=step not in {1, 2, 9, 10, 11, 25, 26, 40})
    assert len(duel.selections) >= 5


def test_the_cases_hold_every_pair():
    columns = Case._fields[:9]
    for one, other in combinations(range(9), 2):
        wanted = set(product({case[one] for case in CASES}, {case[other] for case in CASES}))
        missing = wanted - {(case[one], case[other]) for case in CASES}
        if columns[one] == "mask" and columns[other] == "density":
            missing.remove(("none", 0.4))
        assert not missing, (columns[one], columns[other], missing)
