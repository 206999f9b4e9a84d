"""What `blockllm doctor` finds out about this machine, as plain JSON values; nothing is changed, no secret told."""

from __future__ import annotations

import importlib.metadata
import netrc
import os
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from blockllm_cli.data.cache import default_cache_dir
from blockllm_cli.runner.machine import Machine, describe_environment, on_machine
from blockllm_cli.training.precision import measure_products
from blockllm_cli.units import GIB

LITTLE_DISK_BYTES = 2 * GIB
# Needed by some commands only: their absence is no fault.
OPTIONAL_PACKAGES = ("datasets", "wandb", "transformers", "matplotlib", "zstandard", "pyarrow")


def diagnose(output: Path, *, network: bool) -> dict[str, Any]:
    """Look at everything.

    Args:
        output: folder that runs would be written to; it need not exist.
        network: whether to ask the hub if it is there, which takes at most 5 seconds.
    """
    cpu = torch.device("cpu")
    environment = describe_environment(Machine(cpu, torch.get_num_threads(), deterministic=False))
    # As a run would set it up that names no threads.
    with on_machine(Machine(cpu, environment["cores"], deterministic=False)):
        devices = [_device(device) for device in _devices()]
    memory = psutil.virtual_memory()
    found: dict[str, Any] = {
        "versions": environment["versions"],
        "optional": {name: _version(name) for name in OPTIONAL_PACKAGES},
        "platform": environment["platform"],
        "processor": environment["processor"],
        "cores": environment["cores"],
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available},
        "devices": devices,
        "disk": {"runs": _disk(output), "cache": _disk(default_cache_dir())},
        "credentials": {"wandb": has_wandb_key(), "huggingface": has_hub_token()},
        "hub": probe_hub() if network else {"reachable": None, "detail": "not asked (--no-network)"},
    }
    found["notes"] = _notes(found)
    return found


def has_wandb_key() -> bool:
    """Whether Weights & Biases would find a key: in WANDB_API_KEY or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(str(path)).authenticators("api.wandb.ai"):
                return True
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
    return False


def has_hub_token() -> bool:
    """Whether the Hugging Face hub's library would find a token: in HF_TOKEN or in its token file."""
    if os.environ.get("HF_TOKEN"):
        return True
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    try:
        return Path(os.environ.get("HF_TOKEN_PATH") or home / "token").stat().st_size > 0
    except OSError:
        return False


def probe_hub() -> dict[str, Any]:
    """Ask the hub for one answer, as a run does before it reads from it."""
    from blockllm_cli.hub.http import endpoint, shown
    from blockllm_cli.hub.link import why_out_of_reach

    start = time.monotonic()
    reason = why_out_of_reach(lambda: False)
    if reason is not None:
        return {"reachable": False, "detail": reason}
    return {"reachable": True, "detail": f"{shown(endpoint())} answered in {time.monotonic() - start:.1f} s"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    return devices


def _device(device: torch.device) -> dict[str, Any]:
    """One device: its name, memory and how fast it multiplies; a device that cannot says why instead."""
    described: dict[str, Any] = {"device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {"name": properties.name, "memory_bytes": properties.total_memory}
    try:
        speed = measure_products(device)
    except RuntimeError as error:
        return described | {"problem": str(error).partition("\n")[0]}
    return described | {
        "fp32_flops": speed.fp32,
        "bf16_flops": speed.bf16,
        "precision_auto": "bf16" if speed.prefers_bf16 else "fp32",
    }


def _disk(folder: Path) -> dict[str, Any]:
    """Free bytes where `folder` is or would be made."""
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return {"path": str(folder), "free_bytes": shutil.disk_usage(there).free, "writable": os.access(there, os.W_OK)}


def _notes(found: dict[str, Any]) -> list[str]:
    """What a user should know before a run, with the way out."""
    notes = []
    for use, key in (("runs", "--output"), ("cache", "data.cache or BLOCKLLM_CACHE")):
        disk = found["disk"][use]
        if not disk["writable"]:
            notes.append(f"{disk['path']} cannot be written: choose another folder with {key}")
        elif disk["free_bytes"] < LITTLE_DISK_BYTES:
            notes.append(f"{disk['path']} has little space left: choose another folder with {key}")
    if found["hub"]["reachable"] is False:
        notes.append('without the hub the corpora "builtin" and "files" work, with a tokenizer trained from them')
    notes += [
        f"{device['device']} is there but does not work: {device['problem']}"
        for device in found["devices"]
        if "problem" in device
    ]
    return notes
