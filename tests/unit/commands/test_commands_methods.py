"""`blockllm methods`."""

import json

import pytest

import blockllm_cli.testing
from blockllm_cli.app import main
from blockllm_cli.methods.adamw import AdamW
from blockllm_cli.methods.registry import method_names
from blockllm_cli.testing import Result


def test_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(method_names())]] == method_names()
    assert main(["methods", "--json"]) == 0
    assert [facts["name"] for facts in json.loads(capsys.readouterr().out)] == method_names()


def test_describes_one_method_with_options_and_published_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "adamw"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("adamw: AdamW\n")
    assert "  betas = [0.9, 0.999]  (a list of 2 numbers, each in [0, 1))\n" in text
    assert "  seed = absent  (an integer" in text
    assert "  60m      learning_rate 0.001, dense_rate as learning_rate, clip 0" in text


@pytest.mark.parametrize("name", method_names())
def test_the_json_of_a_method_is_complete(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", name, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["name"] == name
    assert facts["title"]
    assert facts["paper"]
    assert facts["hyperparameters"]
    assert "seed" in facts["options"]
    for option in facts["options"].values():
        assert set(option) == {"allowed", "default", "required", "description"}
        assert option["description"]


def test_an_unknown_method_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "adamww"]) == 2
    assert capsys.readouterr().err == 'error: there is no method "adamww"; did you mean adamw?\n'


def test_the_word_show_can_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["methods", "adamw"], ["methods", "show", "adamw"]):
        assert main(arguments) == 0
    one, _, other = capsys.readouterr().out.partition("\nadamw: ")
    assert one.removeprefix("adamw: ") == other.removesuffix("\n")
    assert main(["methods", "--json", "adamw"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "adamw"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> list:
    """Takes the place of the suite, which has tests of its own: one check passes, one does not apply, one may fail."""
    asked: list = []

    def run(method, options, on_result):
        asked.append((method, options))
        failed = Result("c", "Third", "failed", "adamw: x is 1. The contract: it is 2.", 0.3)
        results = [
            Result("a", "First", "passed", "", 0.1),
            Result("b", "Second", "not applicable", "for a reason", 0.2),
            *([failed] if options else []),
        ]
        for result in results:
            on_result(result)
        return results

    monkeypatch.setattr(blockllm_cli.testing, "run_suite", run)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    return asked


def test_check_prints_a_line_per_check(suite: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "check", "adamw"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok      First  (0.1 s)",
        "-       Second  (0.2 s)",
        "        for a reason",
        "method adamw keeps the contract: 1 checks passed",
    ]
    assert suite == [(AdamW, {})]


def test_a_broken_promise_ends_with_7(suite: list, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--option", "weight_decay=0.1", "--option", "betas=[0.9, 0.95]"]
    assert main(["methods", "check", "adamw", *options]) == 7
    printed = capsys.readouterr()
    assert "FAILED  Third  (0.3 s)\n        adamw: x is 1. The contract: it is 2.\n" in printed.out
    assert printed.err == "error: method adamw does not keep 1 of 3 promises of the contract\n"
    assert suite == [(AdamW, {"weight_decay": 0.1, "betas": [0.9, 0.95]})]
    assert main(["methods", "check", "adamw", *options, "--json"]) == 7
    results = json.loads(capsys.readouterr().out)
    assert [result["status"] for result in results] == ["passed", "not applicable", "failed"]
    assert set(results[0]) == {"check", "title", "status", "message", "seconds"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["adamww"], 'there is no method "adamww"; did you mean adamw?'),
        (["adamw", "--option", "weigth_decay=1"], "adamw has no such option; did you mean weight_decay?"),
        (["adamw", "--option", "betas"], "write key=value"),
        (["adamw", "--option", "eps=0"], "method.eps = 0: must be a number above 0"),
        (["sgd", "--option", "momentum=0", "--option", "nesterov=true"], "needs momentum above 0"),
    ],
)
def test_a_check_of_nothing_ends_with_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "check", *arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""


def test_help_of_check_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "check", "--help"]) == 0
    assert "Example: blockllm methods check adamw" in capsys.readouterr().out
