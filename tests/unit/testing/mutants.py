"""Methods that break the contract, by the check that has to find them out."""

import pytest

from blockllm_cli.methods.adamw import AdamW

HEAD = "lm_head.weight"


def breaks(*checks, says=""):
    """This method must be found out by each of these checks, whose message has the words `says`."""

    def note(kind):
        kind.breaks = (*vars(kind).get("breaks", ()), *((check, says) for check in checks))
        return kind

    return note


def mutants_of(*modules):
    """Class, check and words for each `breaks` in `modules`, on classes that stand there or in a tuple there."""
    for module in modules:
        for value in vars(module).values():
            for kind in value if isinstance(value, tuple) else (value,):
                if isinstance(kind, type) and kind.__module__ == module.__name__:
                    for check, says in vars(kind).get("breaks", ()):
                        yield pytest.param(kind, check, says, id=f"{kind.__name__}-{check}")


class Mutant(AdamW):
    """An AdamW that is right."""
