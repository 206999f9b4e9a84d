"""The Triton kernel bound to the interpreter, which runs it on CPU tensors, and what its rounding should give."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from blockllm_cli.optim import dense_state, kept_state
from blockllm_cli.optim.adam import AdamRule
from blockllm_cli.optim.precision import Precision
from blockllm_cli.optim.triton_adam import TritonAdam

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def interpreted_kernels(patch: pytest.MonkeyPatch) -> ModuleType:
    """A copy of `triton_kernels` for the interpreter; the module itself, and Triton, stay with the compiler."""
    from triton.runtime.interpreter import InterpreterBuilder

    name = "triton_kernels"
    found = importlib.util.find_spec(f"blockllm_cli.optim.{name}")
    assert found is not None
    assert found.origin is not None
    spec = importlib.util.spec_from_file_location(f"interpreted_{name}", found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as loading:
        loading.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    # Interpreters of former versions round the product too.
    patch.setattr(InterpreterBuilder, "create_fma", _fused)
    return module


def _fused(builder: object, x: Any, y: Any, z: Any) -> Any:
    """fp32 fma of what the interpreter holds; the product is exact in fp64, and so is, but for rare ties, the rest."""
    from triton.runtime.interpreter import TensorHandle

    total = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return TensorHandle(total.astype(np.float32), z.dtype.scalar)


def interpret(patch: pytest.MonkeyPatch, kernels: ModuleType, block: int) -> None:
    """Let states that are made from here on update their CPU tensors by `kernels`, in tiles of `block`."""

    def made(rule: AdamRule, precision: Precision, seed: int, weights: object) -> TritonAdam:
        return TritonAdam(rule, precision, seed, kernels=kernels, block=block)

    patch.setattr(kept_state, "triton_adam", made)
    patch.setattr(dense_state, "triton_adam", made)


def philox(counter: np.ndarray, key: tuple[int, int], rounds: int) -> np.ndarray:
    """Philox 4x32 (Salmon et al. 2011) in the plainest form: counters uint64 (4, n) below 2**32, result alike."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = counter.astype(np.uint64)
    k0, k1 = key
    for _ in range(rounds):
        wide0, wide2 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (wide2 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            wide2 & low,
            (wide0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            wide0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3])


def rounded_by(draws: np.ndarray, values: torch.Tensor) -> torch.Tensor:
    """fp32 `values`, all finite, as bf16, with the lower 16 bits of `draws` added below the bits that are kept."""
    raw = values.numpy().view(np.uint32).astype(np.uint64) + (draws & np.uint64(0xFFFF))
    return torch.from_numpy((raw >> np.uint64(16)).astype(np.uint16).view(np.int16)).view(torch.bfloat16)
