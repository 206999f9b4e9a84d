"""The contract of a training method as a suite of checks, for authors of methods. See `docs/plugins.md`."""

from blockllm_cli.testing.subject import ContractError
from blockllm_cli.testing.suite import Case, Result, cases, run_suite

__all__ = ["Case", "ContractError", "Result", "cases", "run_suite"]
