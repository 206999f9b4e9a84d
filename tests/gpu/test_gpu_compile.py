"""Compiled layers on a CUDA device."""

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_selections_compile_nothing_anew_and_losses_are_those_of_plain_layers(tiny, precision):
    """R19."""
    sets = ("run.device=cuda", f"run.precision={precision}", "schedule.steps=8", "schedule.warmup=2")
    method = 'blockllm:patience=2,max_interval=2,always=["head"],sparsity=0.9,score=random'
    plain, compiled = tiny.run(*sets, method=method), tiny.run(*sets, "run.compile=layer", method=method)
    assert sum(event["kind"] == "selection" for event in compiled.events) >= 3
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    np.testing.assert_allclose(compiled.column("train/loss"), plain.column("train/loss"), rtol=tolerance)
    assert 1 <= compiled.summary["compilations"] <= 6
