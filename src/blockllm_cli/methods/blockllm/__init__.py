"""BlockLLM: see `method`."""

from blockllm_cli.methods.blockllm.method import BlockLLM

__all__ = ["BlockLLM"]
