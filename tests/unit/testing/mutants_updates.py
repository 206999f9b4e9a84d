"""Methods that move the wrong weights, or by the wrong amount, or hold other bytes than they planned."""

import torch
from mutants import HEAD, Mutant, breaks

from blockllm_cli.footprint import TensorPlan
from blockllm_cli.gradients.routes import Dense
from blockllm_cli.methods.base import Backward, Held, Rates


@breaks("descends", says="in fp32, the mean loss")
class Ascends(Mutant):
    def update(self, step, rates, chosen, loss, **keywords):
        return super().update(step, Rates(-rates.body, -rates.dense), chosen, loss, **keywords)


@breaks("moves_what_it_trains", says="lm_head.weight did not move")
class ForgetsATensor(Mutant):
    def passes(self, step, rates):
        yield Backward({name: Dense(self._accumulator) for name in self._names if name != HEAD})


@breaks("moves_what_it_trains", says="lm_head.weight moved")
class TrainsWhatItSaysItDoesNot(Mutant):
    def prepare(self, model):
        super().prepare(model)
        self._head = model.head_weight

    def update(self, step, rates, chosen, loss, **keywords):
        with torch.no_grad():
            self._head.mul_(0.9)
        return super().update(step, rates, chosen, loss, **keywords)

    def trains(self, name):
        return name != HEAD


@breaks("uses_both_rates", says="when only the body rate was not 0")
class BodyRateForAll(Mutant):
    def update(self, step, rates, chosen, loss, **keywords):
        return super().update(step, Rates(rates.body, rates.body), chosen, loss, **keywords)


@breaks("uses_both_rates", says="moved in update 3 at rates 0")
@breaks("moves_in_proportion_to_the_rate", says="update 3 moved")
class KeepsItsFirstRates(Mutant):
    _first = None

    def update(self, step, rates, chosen, loss, **keywords):
        self._first = self._first or rates
        return super().update(step, self._first, chosen, loss, **keywords)


@breaks("moves_in_proportion_to_the_rate", says="an entry moved by")
class LimitsItsRate(Mutant):
    def update(self, step, rates, chosen, loss, **keywords):
        return super().update(step, Rates(min(rates.body, 1e-3), rates.dense), chosen, loss, **keywords)


@breaks("uses_both_rates", says="did not move in 3 updates at body rate")
class DeafToTheBodyRate(Mutant):
    def update(self, step, rates, chosen, loss, **keywords):
        return super().update(step, Rates(0.0, rates.dense), chosen, loss, **keywords)


@breaks("writes_from_what_it_chose", says="every chosen tensor set to 0")
class WritesFromItsOwnCopy(Mutant):
    def choose(self, step, results):
        self._own = {key: value.clone() for key, value in results[-1].gradients.items()}
        return results[-1].gradients

    def update(self, step, rates, chosen, loss, **keywords):
        return super().update(step, rates, self._own, loss, **keywords)


@breaks("holds_nothing_else", says="beside the model")
class KeepsItsGradients(Mutant):
    def choose(self, step, results):
        self._kept = [*getattr(self, "_kept", []), results[-1].gradients]
        return results[-1].gradients


@breaks("gives_plain_weights", says="copies lm_head.weight")
class CopiesWeights(Mutant):
    def merged_weights(self, model):
        merged = super().merged_weights(model)
        return {**merged, **({HEAD: merged[HEAD].clone()} if HEAD in merged else {})}


@breaks("gives_plain_weights", says="model.norm.weight is on one side only")
class LosesAWeight(Mutant):
    def merged_weights(self, model):
        return {name: value for name, value in super().merged_weights(model).items() if name != "model.norm.weight"}


@breaks("gives_plain_weights", says="has a loss of [nan")
class SpoilsWeights(Mutant):
    def merged_weights(self, model):
        return {name: value * torch.nan for name, value in super().merged_weights(model).items()}


@breaks("holds_what_it_planned", says="optimizer_state are 47,744 bytes after `prepare`, 23,872 were planned")
class PlansOneMoment(Mutant):
    def plan(self, shapes):
        return [plan for plan in super().plan(shapes) if not plan.name.endswith("exp_avg_sq")]


@breaks("holds_what_it_planned", says="optimizer_state are")
class PlansTooSmallABound(Mutant):
    def plan(self, shapes):
        gradients = [plan for plan in super().plan(shapes) if plan.category == "gradients"]
        return [*gradients, TensorPlan("all.exp_avg", "optimizer_state", (100,), "float32")]


@breaks("holds_what_it_planned", says="is None, planned was")
class PlansTooMuch(Mutant):
    def plan(self, shapes):
        return [*super().plan(shapes), TensorPlan(f"{HEAD}.third", "optimizer_state", (3,), "float32")]


@breaks("holds_what_it_planned", says="is (4096, 'float32'), planned was (2048, 'bfloat16')")
class AccumulatesWiderThanPlanned(Mutant):
    def passes(self, step, rates):
        yield Backward({name: Dense(torch.float32) for name in self._names})


@breaks("holds_what_it_planned", says="master_weights are")
class HoldsMoreEachTime(Mutant):
    def __init__(self, options, setting):
        super().__init__(options, setting)
        self._more = []

    def update(self, step, rates, chosen, loss, **keywords):
        self._more.append(torch.zeros(2000))
        return super().update(step, rates, chosen, loss, **keywords)

    def held(self):
        yield from super().held()
        yield from (Held(f"more{number}", "master_weights", more) for number, more in enumerate(self._more))


class Modest(Dense):
    def held_bytes(self):
        return super().held_bytes() // 2


@breaks("holds_what_it_planned", says="the truth")
class RoutesThatSayLessThanTheyHold(Mutant):
    def passes(self, step, rates):
        yield Backward({name: Modest(self._accumulator) for name in self._names})


@breaks("keeps_state_in_the_dtype_asked_for", says='with state_dtype = "bf16" in fp32')
class IgnoresStateDtype(Mutant):
    def __init__(self, options, setting):
        super().__init__(options.model_copy(update={"state_dtype": None}), setting)


@breaks("counts_what_it_trains", says="`state_entries` is")
class CountsBothMoments(Mutant):
    @property
    def state_entries(self):
        return 2 * super().state_entries


@breaks("counts_what_it_trains", says="`trainable_entries` is 7")
class CountsTooFew(Mutant):
    @property
    def trainable_entries(self):
        return 7


@breaks("counts_what_it_trains", says="no update changed more than")
class CountsTooMany(Mutant):
    @property
    def trainable_entries(self):
        return 2 * super().trainable_entries
