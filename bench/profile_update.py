"""Where the time of one update goes: by kind of operator, with the page faults and the floor that products set.

    python bench/profile_update.py
    python bench/profile_update.py --precision fp32 --size 9m --rows 16

The model is a published size under `adamw`'s arithmetic (torch's fused kernel on the model's own dtype), a batch in one
pass. The floor is what the products of weights would take at the rate of the fastest of them alone.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from blockllm_cli.heap import keep_memory
from blockllm_cli.model.batch import Batch
from blockllm_cli.model.config import SIZES, LlamaConfig
from blockllm_cli.model.llama import build_model
from blockllm_cli.model.products import product

KINDS = {
    "products of weights": ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"),
    "attention": ("aten::bmm", "aten::baddbmm", "aten::_softmax", "flash_attention"),
    "optimizer": ("aten::_fused_adamw_",),
    "casts and copies": ("aten::copy_", "aten::clone", "aten::_to_copy"),
    "fills": ("aten::fill_", "aten::zero_"),
    "exponentials of the loss": ("aten::exp_", "aten::exp2_"),
}
REST = "norms, activations, rotary, sums"
VOCABULARY = 32_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="60m")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--updates", type=int, default=9)
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    update, config = updater(options.size, dtype, options.rows, options.length)
    for _ in range(2):
        update()
    faults, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, []
    for _ in range(options.updates):
        start = time.perf_counter()
        update()
        seconds.append(time.perf_counter() - start)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        update()
    tokens, median = options.rows * options.length, statistics.median(seconds)
    print(f"{options.size}, {options.precision}, {options.rows} x {options.length}, {torch.get_num_threads()} threads")
    print(f"update {median * 1e3:.0f} ms (fastest {min(seconds) * 1e3:.0f}), {tokens / median:,.0f} tokens/s")
    print(f"page faults an update: {faults / options.updates:,.0f}")
    floor, rate = product_floor(config, tokens, dtype)
    print(f"products alone at {rate:.0f} GFLOP/s: {floor * 1e3:.0f} ms, {floor / median:.0%} of the update")
    by_kind = shares(profiled)
    for kind, part in by_kind.most_common():
        print(f"{kind:<36}{part / by_kind.total():>6.1%}")


def updater(size: str, dtype: torch.dtype, rows: int, length: int) -> tuple[Callable[[], None], LlamaConfig]:
    """What makes one update on random rows, and the model's config."""
    shape = SIZES[size]
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=shape["num_attention_heads"], **shape)
    model = build_model(config, seed=0, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    draw = torch.Generator().manual_seed(0)

    def update() -> None:
        pieces = torch.randint(VOCABULARY, (rows, length + 1), generator=draw)
        targets = pieces[:, 1:].reshape(-1)
        batch = Batch(pieces[:, :-1].contiguous(), None, torch.arange(targets.numel()), targets)
        loss, _ = model.loss(batch, scale=1.0 / batch.num_targets)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update, config


def product_floor(config: LlamaConfig, tokens: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of the products with weights of an update at their highest rate, and that rate in GFLOP/s."""
    wide, narrow = config.intermediate_size, config.hidden_size
    matrices = config.num_parameters - (2 * config.num_hidden_layers + 1) * narrow - config.vocab_size * narrow
    x, weight = torch.randn(1024, narrow).to(dtype), torch.randn(wide, narrow).to(dtype)
    fastest = float("inf")
    for _ in range(30):
        start = time.perf_counter()
        product(x, weight.t())
        fastest = min(fastest, time.perf_counter() - start)
    rate = 2 * 1024 * wide * narrow / fastest
    return 6 * tokens * matrices / rate, rate / 1e9


def shares(profiled: profile) -> Counter[str]:
    """Microseconds by kind of operator."""
    found: Counter[str] = Counter()
    for event in profiled.key_averages():
        kinds = (kind for kind, names in KINDS.items() if any(name in event.key for name in names))
        found[next(kinds, REST)] += int(event.self_cpu_time_total)
    return found


if __name__ == "__main__":
    keep_memory()
    main()
