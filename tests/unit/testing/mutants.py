"""Methods that break the contract, by the check that has to find them out."""

import pytest

from blockllm_cli.methods.adamw import AdamW

HEAD = "lm_head.weight"
MUTANTS = []


def breaks(*checks, says=""):
    """This method must be found out by each of these checks, whose message has the words `says`."""

    def note(kind):
        MUTANTS.extend(pytest.param(kind, check, says, id=f"{kind.__name__}-{check}") for check in checks)
        return kind

    return note


class Mutant(AdamW):
    """An AdamW that is right."""
