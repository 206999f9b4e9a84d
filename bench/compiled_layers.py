"""What compiled layers save: an update's passes with `run.compile` "off" and "layer", and bytes kept for the backward.

    OMP_NUM_THREADS=1 python bench/compiled_layers.py [--precision bf16] [--rounds 8]

A Llama of hidden size 512 with 8 layers, vocabulary 32,000, 4 rows of 256 positions, one thread. Both ways run in turn;
the figure is the least processor time of each.
"""

from __future__ import annotations

import argparse
import time

import torch

from blockllm_cli.gradients.engine import routed
from blockllm_cli.gradients.routes import Dense
from blockllm_cli.model.batch import Batch
from blockllm_cli.model.config import SIZES, LlamaConfig
from blockllm_cli.model.llama import build_model

ROWS, LENGTH, VOCABULARY, LAYERS = 4, 256, 32_000, 8
HEAD = ["lm_head.weight", "model.norm.weight"]


def models(dtype):
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=8, **SIZES["60m"])
    plain, compiled = (build_model(config, seed=0, dtype=dtype) for _ in range(2))
    return {"off": plain, "layer": compiled}, compiled.compile_layers()


def batch():
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1].contiguous(), None, torch.arange(ROWS * LENGTH), ids[:, 1:].flatten())


def passes(model, names, given):
    with routed(model, {name: Dense() for name in names}):
        model.loss(given, scale=1 / given.num_targets)[0].backward()


def kept_bytes(model, names, given):
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with routed(model, {name: Dense() for name in names}), hooks:
        hidden = model.model(given.input_ids)
        return hidden.requires_grad * sum(size for size, _ in kept.values())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    by_way, compiler = models(torch.bfloat16 if arguments.precision == "bf16" else torch.float32)
    names, given = [name for name, _ in by_way["off"].named_parameters()], batch()
    trained = {
        "all": names,
        "top 2 layers": [name for name in names if ".layers.6." in name or ".layers.7." in name] + HEAD,
        "lowest layer": [name for name in names if ".layers.0." in name] + HEAD,
    }
    for what, chosen in trained.items():
        best = dict.fromkeys(by_way, float("inf"))
        for model in by_way.values():
            passes(model, chosen, given)
        for _ in range(arguments.rounds):
            for way, model in by_way.items():
                started = time.process_time()
                passes(model, chosen, given)
                best[way] = min(best[way], time.process_time() - started)
        kept = {way: kept_bytes(model, chosen, given) / 2**20 for way, model in by_way.items()}
        speeds = ", ".join(f"{way} {1e3 * seconds:.0f} ms" for way, seconds in best.items())
        sizes = ", ".join(f"{way} {size:.1f} MiB kept" for way, size in kept.items())
        print(f"{arguments.precision}, {what}: {speeds}, ratio {best['off'] / best['layer']:.3f}; {sizes}", flush=True)
    for compilation in compiler.compilations:
        print(compilation)


if __name__ == "__main__":
    main()
