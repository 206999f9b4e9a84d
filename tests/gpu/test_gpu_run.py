"""The same run on a CUDA device: run by `make test-gpu`."""

import numpy as np
import pytest
import torch

from support.tiny import equal_rows, equal_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_master"])
def test_losses_are_those_of_the_cpu(tiny, precision):
    sets = [f"run.precision={precision}", "batch.micro_rows=4"]
    cpu, gpu = tiny.run(*sets), tiny.run(*sets, "run.device=cuda")
    np.testing.assert_allclose(
        gpu.column("train/loss"), cpu.column("train/loss"), rtol=1e-4 if precision == "fp32" else 3e-2
    )
    assert gpu.summary["train_rows_sha256"] == cpu.summary["train_rows_sha256"]
    assert gpu.summary["memory"] == cpu.summary["memory"]
    assert gpu.summary["peak_allocated_bytes"] >= gpu.summary["memory"]["weights"]


def test_resume_is_exact_with_deterministic_kernels(tiny):
    sets = ["run.device=cuda", "run.deterministic=true"]
    whole, cut = tiny.run(*sets), tiny.run(*sets, stop_after=7)
    resumed = tiny.run(*sets, resume=cut.folder)
    equal_rows(whole.metrics, resumed.metrics)
    equal_tensors(whole.tensors(), resumed.tensors())
