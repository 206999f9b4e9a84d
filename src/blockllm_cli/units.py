"""Units and their one formatter each. GiB is 2**30 bytes, GB is 10**9; only GiB is ever printed for memory."""

from __future__ import annotations

KIB = 2**10
MIB = 2**20
GIB = 2**30


def format_bytes(count: float) -> str:
    """`count` bytes in the largest binary unit that keeps the figure at one or above, such as `1.50 GiB`."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def format_count(count: float) -> str:
    """A plain number in the short form of papers: 950, 58.1k, 58.07M, 6.74B."""
    for suffix, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.{1 if suffix == 'k' else 2}f}{suffix}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """A duration such as `2 h 05 min`, `4 min 10 s`, `8.3 s` or `170 ms`."""
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if seconds >= 60:
        whole = round(seconds)
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
