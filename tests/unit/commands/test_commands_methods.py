"""`blockllm methods`."""

import json

import pytest

from blockllm_cli.app import main
from blockllm_cli.methods.registry import method_names


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
