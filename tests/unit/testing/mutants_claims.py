"""Methods that say of themselves what is not so."""

from dataclasses import replace
from typing import Literal

from mutants import Mutant, breaks
from pydantic import Field

from blockllm_cli.methods.adamw import AdamW, AdamWOptions
from blockllm_cli.methods.base import Cycle, Hyperparameters


@breaks("counts_lost_updates", says="it is None for what did not count")
class RemembersUnchanged(Mutant):
    _last = None

    @property
    def unchanged(self):
        self._last = self._last if super().unchanged is None else super().unchanged
        return self._last


@breaks("counts_lost_updates", says="`unchanged` is None")
class NeverCounts(Mutant):
    @property
    def unchanged(self):
        return None


@breaks("counts_lost_updates", says="then it is 1")
class CountsChanged(Mutant):
    @property
    def unchanged(self):
        return None if super().unchanged is None else 1.0 - super().unchanged


@breaks("counts_lost_updates", says="`unchanged` is 0.0 in fp32")
class CountsInFp32(Mutant):
    _seen = None

    def update(self, step, rates, chosen, loss, *, count_unchanged=False):
        events = super().update(step, rates, chosen, loss, count_unchanged=count_unchanged)
        self._seen = (super().unchanged or 0.0) if count_unchanged else None
        return events

    @property
    def unchanged(self):
        return self._seen


@breaks("has_a_pure_rate_factor", says="rate_factor")
class FactorOfItsHistory(Mutant):
    def rate_factor(self, step):
        return 1.0 / (1 + self._state._step)


@breaks("trains_something", says="false for every tensor")
class TrainsNothing(Mutant):
    def trains(self, name):
        return False


class PatternOptions(AdamWOptions):
    only: tuple[str, ...] = Field(default=(), description="Patterns of the tensors to train.")


@breaks("trains_something", says='["matches-no-tensor"], which matches no tensor, is accepted')
class IgnoresPatterns(Mutant):
    Options = PatternOptions


class BareOptions(AdamWOptions):
    strength: float = 1.0


class VariantOptions(AdamWOptions):
    variant: Literal["one", "two"] = Field(default="one", description="Which.")


class SeedOptions(AdamWOptions):
    seed: int = Field(default=0, description="Seed.")


def named(name, says, **attributes):
    return breaks("states_its_facts", says=says)(type(name, (Mutant,), {"__module__": __name__, **attributes}))


def with_facts(name, says, **changed):
    return named(name, says, facts=replace(AdamW.facts, **changed))


def with_options(name, says, options):
    return named(name, says, Options=options)


WRONG_FACTS = (
    with_facts("NoTitle", "`facts.title` is empty", title=" "),
    with_facts("NoRates", "it publishes no rates", hyperparameters={}),
    with_facts("UnknownSize", "['61m']", hyperparameters={"61m": Hyperparameters(1e-3)}),
    with_facts("NoSource", "are from 'a friend'", hyperparameters={"60m": Hyperparameters(1e-3, source="a friend")}),
    with_facts("ZeroRate", "rates are above 0", hyperparameters={"60m": Hyperparameters(0.0)}),
    with_facts("BadOption", "are refused", hyperparameters={"60m": Hyperparameters(1e-3, options={"bets": 1})}),
    with_facts("InventsVariants", "`facts.variants`", variants=("one",)),
    with_facts("NoCycle", "`facts.cycle.updates` is 0", cycle=Cycle(updates=0)),
    with_options("HidesVariants", "takes ('one', 'two')", VariantOptions),
    with_options("NoDescription", "the option strength has no description", BareOptions),
    with_options("OwnSeed", "there is an option seed", SeedOptions),
)
