"""The machine and the source that a sitting measured."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parents[2]
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def describe() -> dict[str, Any]:
    """Processor, memory, versions, what serves products, the load now, and the commit; no names of users or hosts."""
    libraries = torch.__config__.show()
    return {
        "processor": _processor(),
        "instructions": _instructions(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": os.cpu_count(),
        "governor": _text(GOVERNOR) or "not readable",
        "memory_bytes": psutil.virtual_memory().total,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mkl": _found(r"(?:Math Kernel Library|MKL) Version ([\w.-]+)", libraries),
        "onednn": _found(r"MKL-DNN v([\w.]+)", libraries),
        "openmp": _found(r"OpenMP ([\w.]+)", libraries),
        **_source(),
    }


def _processor() -> str:
    found = re.search(r"^model name\s*: (.*)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def _instructions() -> list[str]:
    found = re.search(r"^(?:flags|Features)\s*: (.*)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    there = set(found.group(1).split()) if found else set()
    return [flag for flag in FLAGS if flag in there]


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").strip()
    return ""


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else "none"


def _source() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "bench/speed")
        return {"commit": git("rev-parse", "HEAD"), "is_changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "is_changed": None}
