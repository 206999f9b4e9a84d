"""Peers: one step of an optimizer on parameters of given shapes with gradients that stay, and what memory allows.

`optimizer` in the spec: "copy" (one tensor into another) and "sum" (one added into another) are what bandwidth is
measured with; "fused" and "foreach" are torch's AdamW, "adamw8bit" is torchao's, "galore" is one GaLoreAdamW and
"galore, layerwise" one for each tensor, as the hooks of layer-wise training call them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from speed.workers.protocol import Requests, Spec
from speed.workers.rows import dtype_of

RATE = 1e-4
COPIED = 2**26
"""Entries of the fp32 tensor that is copied: 256 MiB, far beyond any cache."""
GALORE = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
"""The released setting at 60m. Steps between two refreshes are what is timed; the first step has the refresh."""

PACKAGES = {"adamw8bit": ("torchao",), "galore": ("galore-torch",), "galore, layerwise": ("galore-torch",)}


def parameters_of(spec: Spec) -> dict[str, nn.Parameter]:
    """Parameters by Hugging Face's names, with a gradient each."""
    torch.manual_seed(0)
    made = {}
    for name, shape in spec["shapes"].items():
        made[name] = nn.Parameter(torch.randn(shape).mul_(0.02).to(dtype_of(spec["precision"])))
        made[name].grad = torch.randn_like(made[name]) * 1e-3
    return made


def step_of(name: str, named: Mapping[str, nn.Parameter]) -> Callable[[], object]:
    """One update of all of them."""
    parameters = list(named.values())
    if name in ("fused", "foreach"):
        fused = name == "fused"
        return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=fused, foreach=not fused).step
    if name == "adamw8bit":
        from torchao.optim import AdamW8bit

        eight_bit: torch.optim.Optimizer = AdamW8bit(parameters, lr=RATE, weight_decay=0.0)
        return eight_bit.step
    from galore_torch import GaLoreAdamW

    # Matrices of the decoder layers are projected, all else has plain AdamW.
    groups = [
        {"params": [each], **(GALORE if ".layers." in key and each.dim() == 2 else {})} for key, each in named.items()
    ]
    if name == "galore":
        together: torch.optim.Optimizer = GaLoreAdamW(groups, lr=RATE, no_deprecation_warning=True)
        return together.step
    each_alone: list[torch.optim.Optimizer] = [
        GaLoreAdamW([group], lr=RATE, no_deprecation_warning=True) for group in groups
    ]

    def layerwise() -> None:
        for optimizer in each_alone:
            optimizer.step()

    return layerwise


def of_memory(name: str) -> tuple[Callable[[], object], int]:
    """A copy or a sum in place, and the bytes that it reads and writes."""
    source, target = torch.randn(COPIED), torch.zeros(COPIED)
    if name == "copy":
        return lambda: target.copy_(source), 2 * source.numel() * source.itemsize
    return lambda: target.add_(source, alpha=1e-3), 3 * source.numel() * source.itemsize


def main() -> None:
    """Step until the driver has had enough."""
    requests = Requests()
    name = requests.spec["optimizer"]
    if name in ("copy", "sum"):
        step, moved = of_memory(name)
        facts = {"bytes": moved}
    else:
        named = parameters_of(requests.spec)
        step = step_of(name, named)
        entries = sum(each.numel() for each in named.values())
        facts = {"entries": entries}
        if name in ("fused", "foreach"):
            facts["bytes"] = (
                7 * entries * dtype_of(requests.spec["precision"]).itemsize
            )  # state is of the parameters' dtype
    requests.ready("torch", *PACKAGES.get(name, ()), threads=torch.get_num_threads(), **facts)
    for _ in requests.repeats():
        step()


if __name__ == "__main__":
    main()
