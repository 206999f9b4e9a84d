"""The contract suite bites: each way to break the contract is found by the check that is there for it."""

from dataclasses import replace

import mutants_claims
import mutants_state
import mutants_updates
import pytest
from mutants import Mutant, mutants_of

from blockllm_cli.errors import RecipeError
from blockllm_cli.methods.adamw import AdamW
from blockllm_cli.methods.base import Cycle
from blockllm_cli.methods.sgd import Sgd
from blockllm_cli.testing import ContractError, cases, run_suite

MUTANTS = list(mutants_of(mutants_claims, mutants_state, mutants_updates))


def case_of(kind, check, options=None):
    (found,) = [case for case in cases(kind, options) if str(case) == check]
    return found


@pytest.mark.parametrize(("kind", "check", "says"), MUTANTS)
def test_a_broken_promise_is_found_and_named(kind, check, says):
    with pytest.raises(ContractError) as caught:
        case_of(kind, check)()
    assert str(caught.value).startswith("adamw: ")
    assert says in str(caught.value)
    assert "The contract: " in str(caught.value)


def test_every_check_has_a_method_that_breaks_it():
    assert {str(case) for case in cases("adamw")} == {mutant.values[1] for mutant in MUTANTS}


def test_a_method_that_writes_inside_the_backward_pass_is_compared_with_itself():
    assert case_of(mutants_state.Plain, "is_the_same_layer_by_layer")() is None
    assert (
        "option layerwise is given"
        in case_of(mutants_state.Plain, "is_the_same_layer_by_layer", {"layerwise": False})()
    )


def test_what_does_not_apply_says_why():
    assert "does not write inside" in case_of("adamw", "is_the_same_layer_by_layer")()
    assert "no option state_dtype" in case_of("adamw", "keeps_state_in_the_dtype_asked_for", {"state_dtype": "fp32"})()


def test_options_of_a_cycle_come_beside_those_given():
    class Cyclic(Mutant):
        facts = replace(AdamW.facts, cycle=Cycle(updates=2, options={"eps": 1e-6}))

    found = {str(case): case.subject.options for case in cases(Cyclic, {"weight_decay": 0.1})}
    assert found["resumes_to_the_bit"] == {"weight_decay": 0.1}
    assert found["resumes_to_the_bit-cycle"] == {"weight_decay": 0.1, "eps": 1e-6}
    assert "moves_what_it_trains" not in found
    assert "descends-cycle" not in found
    assert not [name for name in map(str, cases(Cyclic, {"eps": 1e-7})) if "cycle" in name]


def test_options_that_are_refused_are_a_recipe_error():
    for options, words in (({"betas": 7}, "method.betas = 7: must be"), ({"bets": 7}, "method.bets")):
        with pytest.raises(RecipeError, match="options of adamw") as caught:
            cases("adamw", options)
        assert words in str(caught.value)
    with pytest.raises(RecipeError, match="did you mean adamw"):
        cases("adamww")


def test_a_suite_goes_on_after_a_failure_and_tells_each_result(monkeypatch):
    class Raises(Mutant):
        def plan(self, shapes):
            raise ZeroDivisionError("in plan")

    wanted = ("states_its_facts", "holds_what_it_planned", "is_the_same_layer_by_layer", "has_a_pure_rate_factor")
    chosen = [case for case in cases(Raises) if str(case) in wanted]
    monkeypatch.setattr("blockllm_cli.testing.suite.cases", lambda method, options: chosen)
    told = []
    results = run_suite(Raises, on_result=told.append)
    assert told == results
    by_check = {result.check: result for result in results}
    assert {check: result.status for check, result in by_check.items()} == {
        "states_its_facts": "passed",
        "has_a_pure_rate_factor": "passed",
        "holds_what_it_planned": "failed",
        "is_the_same_layer_by_layer": "not applicable",
    }
    failed = by_check["holds_what_it_planned"]
    assert failed.message.startswith("adamw: ZeroDivisionError: in plan (")
    assert __file__ in failed.message
    assert failed.title.startswith("Real bytes never exceed the plan")


def test_state_without_tensors_is_no_reason_to_stumble():
    for check in ("loads_strictly", "counts_what_it_trains", "holds_what_it_planned", "says_plain_things"):
        assert case_of(Sgd, check, {"momentum": 0.0})() is None


def test_a_setting_in_which_layerwise_is_not_refused_is_named_r03(monkeypatch):
    case = case_of("blockllm", "is_the_same_layer_by_layer", {"inactive": "sign"})
    asked = []

    def accept_all(name, *, overrides, method):
        asked.append(method)
        if "batch.micro_rows=1" in overrides:
            raise RecipeError("method.layerwise = true: refused")

    monkeypatch.setattr("blockllm_cli.testing.independence.resolve_recipe", accept_all)
    with pytest.raises(ContractError, match=r"accepted with updates that can be skipped \(run.on_nonfinite=\"skip\"\)"):
        case()
    assert asked == 2 * ['blockllm:inactive="sign",layerwise=true']
