"""The machine a run is on: device, threads, determinism, and the precision that `auto` means there."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from blockllm_cli import __version__
from blockllm_cli.durable import write_json
from blockllm_cli.optim.precision import Precision, PrecisionName, Rounding, precision_of
from blockllm_cli.optim.triton_adam import why_no_triton
from blockllm_cli.recipe.load import LoadedRecipe
from blockllm_cli.recipe.sections import PrecisionWord
from blockllm_cli.training.precision import bf16_is_faster

_PACKAGES = ("torch", "numpy", "sentencepiece", "safetensors", "pydantic", "datasets", "wandb", "triton")


@dataclass(frozen=True)
class Machine:
    """Decisions about the machine, made once per process.

    Attributes:
        device: where the model is.
        threads: CPU threads of torch.
        deterministic: whether torch is held to deterministic kernels, which bit-exact resume rests on.
    """

    device: torch.device
    threads: int
    deterministic: bool


def choose_machine(loaded: LoadedRecipe) -> Machine:
    """Decide from the recipe and what is there.

    Raises:
        RecipeError: `run.device` is not there.
    """
    run = loaded.recipe.run
    device = _device(loaded)
    threads = run.threads or usable_cores()
    deterministic = run.deterministic if run.deterministic is not None else device.type == "cpu"
    return Machine(device, threads, deterministic)


def _device(loaded: LoadedRecipe) -> torch.device:
    asked = loaded.recipe.run.device
    there = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        there.append("mps")
    if asked == "auto":
        return torch.device("cuda:0" if "cuda:0" in there else "mps" if "mps" in there else "cpu")
    named = "cuda:0" if asked == "cuda" else asked
    if named not in there:
        raise loaded.error("run.device", "is not on this machine", fix=f"it has {', '.join(there)}")
    return torch.device(named)


def usable_cores() -> int:
    """Cores this process may use; hyper-threads do not speed products up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


@contextlib.contextmanager
def on_machine(machine: Machine) -> Iterator[None]:
    """Hold torch to the machine's decisions for the duration of the block."""
    threads = torch.get_num_threads()
    deterministic = torch.get_deterministic_debug_mode()
    filling: Any = torch.utils.deterministic  # a module whose one attribute is a property
    fill = filling.fill_uninitialized_memory
    torch.set_num_threads(machine.threads)
    if machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Not `use_deterministic_algorithms`, which imports the compiler, a second of work, to tell it the same.
    torch.set_deterministic_debug_mode("error" if machine.deterministic else "default")
    # Filling fresh memory guards against reading it; nothing here does, and it costs a pass over every buffer.
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(deterministic)
        filling.fill_uninitialized_memory = fill


def choose_precision(name: PrecisionWord, rounding: Rounding, device: torch.device) -> tuple[Precision, str]:
    """The precision of the run and, where `auto` was asked for, a line on what decided."""
    if name != "auto":
        return precision_of(name, rounding), ""
    faster = bf16_is_faster(device)
    chosen: PrecisionName = "bf16" if faster else "fp32"
    note = f"precision auto: {chosen}, since products in bf16 are {'' if faster else 'not '}faster on this machine"
    return precision_of(chosen, rounding), note


def describe_environment(machine: Machine) -> dict[str, Any]:
    """What environment.json says: versions, machine, source commit; no names of users or hosts, no secrets."""
    device: dict[str, Any] = {"type": machine.device.type}
    if machine.device.type == "cuda":
        device["name"] = torch.cuda.get_device_name(machine.device)
        device["memory_bytes"] = torch.cuda.get_device_properties(machine.device).total_memory
        reason = why_no_triton(machine.device)
        device["updates"] = "triton" if reason is None else f"torch ({reason})"
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": machine.threads,
        "memory_bytes": psutil.virtual_memory().total,
        "device": device,
        "deterministic": machine.deterministic,
        "source": _source(),
    }


def note_environment(path: Path, now: dict[str, Any]) -> list[str]:
    """Put the machine of a resumed run into environment.json; one line for each change that ends bit-exactness.

    The former description moves to the list under `earlier`.
    """
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{key} was {before[key]}, is {now[key]}: from here on the run may differ in bits from an unbroken one"
            for key in ("threads", "device", "deterministic", "processor")
            if before[key] != now[key]
        ]
        earlier = [*before.pop("earlier", []), before]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ["environment.json could not be read, so nobody can say whether this is the machine the run began on"]
    if {key: value for key, value in before.items() if key != "source"} == {
        key: value for key, value in now.items() if key != "source"
    }:
        return []
    write_json(path, {**now, "earlier": earlier})
    return changed


def versions() -> dict[str, str]:
    """Versions of Python, this package, and the packages that numbers can depend on."""
    found = {"python": platform.python_version(), "blockllm": __version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _processor() -> str:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _source() -> dict[str, Any] | None:
    """Commit of the checkout this package runs from and whether it was changed; None for an installed wheel."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changed.strip())}
