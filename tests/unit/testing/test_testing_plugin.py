"""The example of a method in a package of its own: found, held to the contract, trained with, documented as it is."""

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PLUGIN = ROOT / "examples" / "plugin"
BLOCKLLM = str(Path(sys.executable).with_name("blockllm"))


@pytest.fixture
def installed(tmp_path):
    """An environment in which the package is as if installed: its module, and the metadata that pip would write."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = tmp_path / "site" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(metadata.parent), str(PLUGIN)])}


def blockllm(environment, *arguments):
    return subprocess.run([BLOCKLLM, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_its_method_stands_among_the_others(installed):
    done = blockllm(installed, "methods", "--json")
    assert done.returncode == 0, done.stderr
    described = {facts["name"]: facts for facts in json.loads(done.stdout)}
    assert "2302.06675" in described["lion"]["paper"]
    assert "adamw" in described


@pytest.mark.slow
def test_it_keeps_the_contract(installed):
    done = blockllm(installed, "methods", "check", "lion", "--option", "weight_decay=0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("method lion keeps the contract: ")


def test_it_trains(installed, tiny):
    done = tiny.call("--method", "lion", "--set", "schedule.steps=3", "--set", "schedule.warmup=0", env=installed)
    assert done.returncode == 0, done.stderr
    run = tiny.newest()
    assert run.summary["status"] == "completed"
    assert {key.rpartition(".")[2] for key in run.tensors("method")} == {"exp_avg"}


def test_its_own_tests_pass(monkeypatch):
    """Those but the contract, which the command above runs."""
    monkeypatch.syspath_prepend(PLUGIN)
    runpy.run_path(str(PLUGIN / "test_blockllm_lion.py"))["test_the_rule_is_that_of_the_paper"]()


def test_the_documentation_shows_it_as_it_is():
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    files = "\n".join(path.read_text(encoding="utf-8") for path in sorted(PLUGIN.iterdir()) if path.is_file())
    blocks = re.findall(r"```(?:python|toml)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        assert block in files
