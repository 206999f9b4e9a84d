"""`run.compile = "layer"` with the code that the compiler generates, and where it can generate none."""

import os
import shutil

import pytest

from support.tiny import equal_tensors

pytestmark = pytest.mark.slow

SHORT = (
    "run.compile=layer",
    "schedule.steps=4",
    "schedule.warmup=1",
    "evaluate.every=2",
    "evaluate.tokens=200",
)
SETS = [part for one in SHORT for part in ("--set", one)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("layout", ["pack", "truncate"])
def test_generated_code_gives_the_losses_of_plain_layers(tiny, layout):
    """R19."""
    more = f"data.layout={layout}"
    plain = tiny.run(*SHORT[1:], more)
    done = tiny.call(*SETS, "--set", more)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    compiled = tiny.newest()
    for key in ("train/loss", "eval/loss"):
        for one, other in zip(compiled.column(key), plain.column(key), strict=True):
            assert abs(one - other) <= 1e-6 * other
    assert 1 <= compiled.summary["compilations"] <= 4


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_resume_with_generated_code_is_exact(tiny):
    assert tiny.call(*SETS).returncode == 0
    whole = tiny.newest()
    cut = tiny.call(*SETS, "--stop-after", "2")
    assert cut.returncode == 0, cut.stderr
    resumed = tiny.call(*SETS, "--resume", "latest")
    assert resumed.returncode == 0, resumed.stderr
    assert tiny.newest().folder != whole.folder
    equal_tensors(tiny.newest().tensors(), whole.tensors())


def test_without_a_compiler_the_run_ends_before_it_begins(tiny):
    environment = {**os.environ, "CXX": str(tiny.folder / "no compiler"), "OMP_NUM_THREADS": "1"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tiny.folder / "nothing compiled yet")
    done = tiny.call(*SETS, env=environment)
    assert done.returncode == 2
    assert 'run.compile = "layer": torch.compile fails on this machine: InvalidCxxCompiler' in done.stderr
    assert 'Set run.compile = "off"' in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tiny.folder / "runs").exists()
