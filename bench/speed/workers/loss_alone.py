"""The loss with its backward pass, from hidden states and head: the package's, and torch's ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from blockllm_cli.model.loss import chunked_nll
from speed.workers.protocol import Requests


def ways(hidden: Tensor, head: Tensor, targets: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Name -> the mean loss, to be differentiated."""
    tokens = targets.numel()
    found: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: chunked_nll(hidden, head, targets, scale=1 / tokens)[0],
        "plain": lambda: F.cross_entropy((hidden @ head.t()).float(), targets),
        "plain, logits as they come": lambda: F.cross_entropy(hidden @ head.t(), targets),
    }
    return found


def tensors(tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (tokens, hidden), a head (vocabulary, hidden), both asking for gradients, and targets."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, dtype=dtype, requires_grad=True)
    head = (torch.randn(vocab_size, hidden_size) * 0.02).to(dtype).requires_grad_()
    return hidden, head, torch.randint(vocab_size, (tokens,))


def main() -> None:
    """Forward and backward until the driver has had enough."""
    requests = Requests()
    spec = requests.spec
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[spec["precision"]]
    hidden, head, targets = tensors(spec["tokens"], spec["hidden_size"], spec["vocab_size"], dtype)
    way = ways(hidden, head, targets)[spec["way"]]
    requests.ready("torch", threads=torch.get_num_threads())
    for _ in requests.repeats():
        torch.autograd.backward(way())
        hidden.grad = head.grad = None


if __name__ == "__main__":
    main()
