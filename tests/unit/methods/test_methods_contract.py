"""What every method must do, whichever it is. The list comes from the registry: a new method is held to it at once."""

import pytest
import torch

from blockllm_cli.errors import InputError
from blockllm_cli.methods.dense import DenseMethod
from blockllm_cli.methods.registry import method_class, method_names
from blockllm_cli.testing import cases
from support.methods import make_method, toy_llama

OTHERS = {
    "adamw": [{"weight_decay": 0.1, "state_dtype": "bf16"}],
    "sgd": [{"momentum": 0.0}],
    "blockllm": [{"variant": "paper"}, {"inactive": "normalized"}, {"mask": "row", "density": 0.4, "state": "offload"}],
}
"""Options that lead through other code than the defaults."""

DENSE = [name for name in method_names() if issubclass(method_class(name), DenseMethod)]


def contract():
    for name in method_names():
        yield from (pytest.param(case, id=f"{name}-{case}") for case in cases(name))
        for options in OTHERS.get(name, []):
            words = ",".join(f"{key}={value}" for key, value in options.items())
            for case in cases(name, options):
                yield pytest.param(case, id=f"{name}:{words}-{case}", marks=pytest.mark.slow)


def does_not_apply(case):
    """Whether the promise is none that this method makes with these options."""
    options = case.subject.options
    match case.check.__name__:
        case "is_the_same_layer_by_layer":
            return case.subject.kind.facts.layerwise == "never" or options.get("inactive", "none") == "none"
        case "keeps_state_in_the_dtype_asked_for":
            return "state_dtype" in options
    return False


@pytest.mark.parametrize("case", list(contract()))
def test_contract(case):
    reason = case()
    assert (reason is not None) == does_not_apply(case), reason


def prepared(name):
    method = make_method(name, precision="bf16_master")
    method.prepare(toy_llama(torch.bfloat16))
    return method


@pytest.mark.parametrize("name", DENSE)
def test_state_of_a_dense_method_has_torchs_names(name):
    for key, value in prepared(name).state_dict().items():
        if isinstance(value, torch.Tensor):
            assert key.rpartition(".")[2] in {"exp_avg", "exp_avg_sq", "momentum_buffer", "master"}
        else:
            assert key == "step"
            assert type(value) is int


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_method_loads_in_place_and_refuses_a_step_that_is_none(name):
    method = prepared(name)
    state = {key: value.clone() if torch.is_tensor(value) else value for key, value in method.state_dict().items()}
    addresses = {held.name: held.tensor.data_ptr() for held in method.held()}
    method.load_state_dict(state)
    assert {held.name: held.tensor.data_ptr() for held in method.held()} == addresses
    for step in ("3", True, -1, 2.0):
        with pytest.raises(InputError, match="step"):
            method.load_state_dict({**state, "step": step})
