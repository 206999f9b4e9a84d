"""What a run does not load before its first update."""

import subprocess
import sys

SCRIPT = """
import sys
import torch
from blockllm_cli.model.config import LlamaConfig
from blockllm_cli.model.llama import build_model
from blockllm_cli.optim.adam import AdamRule
from blockllm_cli.optim.dense_state import DenseState
from blockllm_cli.optim.precision import precision_of
from blockllm_cli.runner.machine import Machine, on_machine

heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, **heads)
with on_machine(Machine(torch.device("cpu"), 1, True)):
    assert torch.are_deterministic_algorithms_enabled()
    weights = dict(build_model(config, seed=0).named_parameters())
    state = DenseState(AdamRule(), precision_of("fp32"), 0)
    state.allocate(weights)
    state.update({name: torch.ones_like(weight) for name, weight in weights.items()}, lambda name: 0.1)
assert not torch.are_deterministic_algorithms_enabled()
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


def test_a_run_without_compilation_does_not_load_the_compiler():
    """It takes a second and a hundred megabytes."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout) == ("", "[]\n")
