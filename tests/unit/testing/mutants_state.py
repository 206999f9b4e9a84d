"""Methods that do not resume as they were, or whose updates hang on what must not matter."""

import random
from dataclasses import replace

import torch
from mutants import HEAD, Mutant, breaks
from pydantic import Field

from blockllm_cli.gradients.routes import Dense, Layerwise
from blockllm_cli.methods.adamw import AdamW, AdamWOptions
from blockllm_cli.methods.base import Backward, Rates


@breaks("resumes_to_the_bit", says="against 8 in one go")
class ForgetsItsStep(Mutant):
    def state_dict(self):
        return {**super().state_dict(), "step": 0}


@breaks("resumes_to_the_bit", says="`load_state_dict`")
class LoadsOneMomentOnly(Mutant):
    def load_state_dict(self, state):
        mine = {key: value.clone() if torch.is_tensor(value) else value for key, value in self.state_dict().items()}
        super().load_state_dict({k: mine[k] if k.endswith("exp_avg_sq") else v for k, v in state.items()})


@breaks("resumes_to_the_bit", says="1 updates, a resume and 7 more")
class GoesByACounterThatIsNotSaved(Mutant):
    _count = 0

    def update(self, step, rates, chosen, loss, **keywords):
        self._count += 1
        factor = 1.0 if self._count < 7 else 0.5
        return super().update(step, Rates(rates.body * factor, rates.dense), chosen, loss, **keywords)


@breaks("says_plain_things", says="'order'")
class SavesATuple(Mutant):
    def state_dict(self):
        return {**super().state_dict(), "order": (1, 2)}


@breaks("says_plain_things", says="the key '0.exp_avg'")
class SavesByPosition(Mutant):
    def state_dict(self):
        tensors = [value for value in super().state_dict().values() if torch.is_tensor(value)]
        return {f"{number}.exp_avg": value for number, value in enumerate(tensors)}


@breaks("says_plain_things", says="returned the event")
class ReportsATensor(Mutant):
    def update(self, step, rates, chosen, loss, **keywords):
        super().update(step, rates, chosen, loss, **keywords)
        return [{"kind": "norm", "value": torch.zeros(())}]


class Lenient(Mutant):
    def load_state_dict(self, state):
        mine = self.state_dict()
        super().load_state_dict({**mine, **{key: value for key, value in state.items() if key in mine}})


breaks("loads_strictly", says="is too much was loaded without complaint")(Lenient)


@breaks("loads_strictly", says="is missing raised KeyError")
class LoadsByIndex(Mutant):
    def load_state_dict(self, state):
        super().load_state_dict({**state, "step": state["step"]})


@breaks("loads_strictly", says="is torch.float64 was loaded without complaint")
class LoadsAnyDtype(Mutant):
    def load_state_dict(self, state):
        super().load_state_dict(
            {k: v.to(torch.float32) if torch.is_tensor(v) and v.dtype == torch.float64 else v for k, v in state.items()}
        )


class LastOnly(Dense):
    def accept(self, gradient):
        self._sum = gradient.clone()


@breaks("accumulates_like_one_batch", says="the kept norm of update 1")
class SeesTheLastMicroBatchOnly(Mutant):
    def passes(self, step, rates):
        yield Backward({name: LastOnly() for name in self._names})


@breaks("accumulates_like_one_batch", says="weights differ between one batch and 2 micro-batches")
class SlowerWithMicroBatches(Mutant):
    def __init__(self, options, setting):
        super().__init__(options, setting)
        self._factor = 1.0 / setting.micro_batches

    def update(self, step, rates, chosen, loss, **keywords):
        slower = Rates(rates.body * self._factor, rates.dense) if step == 4 else rates
        return super().update(step, slower, chosen, loss, **keywords)


@breaks("gives_up_an_update_without_trace", says="left its trace")
class CountsWhenItChooses(Mutant):
    def choose(self, step, results):
        self._state._step += 1
        return super().choose(step, results)


@breaks("gives_up_an_update_without_trace", says="the kept norm of update 1 is 0")
class HidesNotANumber(Mutant):
    def choose(self, step, results):
        return {key: value.nan_to_num(0.0) for key, value in results[-1].gradients.items()}


@breaks("repeats_itself", says="global generator of torch")
class DrawsFromTorch(Mutant):
    def update(self, step, rates, chosen, loss, **keywords):
        for value in chosen.values():
            value.add_(torch.randn(value.shape), alpha=1e-3)
        return super().update(step, rates, chosen, loss, **keywords)


@breaks("repeats_itself", says="other seeds of the global generators")
class ReadsTheGlobalSeed(Mutant):
    def update(self, step, rates, chosen, loss, **keywords):
        rate = rates.body * (1 + 1e-3 * random.Random(torch.initial_seed()).random())
        return super().update(step, Rates(rate, rates.dense), chosen, loss, **keywords)


class LayerwiseOptions(AdamWOptions):
    layerwise: bool = Field(default=False, description="Whether the head is updated inside the backward pass.")


class Plain(Mutant):
    """Trains the head by plain gradient descent, inside the backward pass if it is asked to; right."""

    Options = LayerwiseOptions
    facts = replace(AdamW.facts, layerwise="any")
    factor = 1.0
    everywhere = False
    deaf = False

    def __init__(self, options, setting):
        super().__init__(options, setting)
        self._inside = options.layerwise or (self.everywhere and setting.micro_batches > 1)
        self._inside &= not self.deaf

    def prepare(self, model):
        super().prepare(model)
        self._head = model.head_weight

    def passes(self, step, rates):
        def write(gradient):
            self._head.add_(gradient, alpha=-self.factor * rates.dense)

        routes = {name: Dense(self._accumulator) for name in self._names if name != HEAD}
        routes[HEAD] = Layerwise(write) if self._inside else Dense(self._accumulator)
        yield Backward(routes)

    @torch.no_grad()
    def update(self, step, rates, chosen, loss, **keywords):
        chosen = dict(chosen)
        if HEAD in chosen:
            self._head.add_(chosen.pop(HEAD), alpha=-rates.dense)
        return super().update(step, rates, chosen, loss, **keywords)


@breaks("is_the_same_layer_by_layer", says="weights differ between layerwise = true and layerwise = false")
class OtherRateInside(Plain):
    factor = 30.0


@breaks("is_the_same_layer_by_layer", says="a route writes inside the backward pass with layerwise = false")
class InsideWithMicroBatches(Plain):
    everywhere = True


@breaks("is_the_same_layer_by_layer", says="no route writes inside")
class OptionWithoutEffect(Plain):
    deaf = True


@breaks("is_the_same_layer_by_layer", says='`facts.layerwise` is "any"')
class ClaimsToWriteInside(Mutant):
    facts = replace(AdamW.facts, layerwise="any")
