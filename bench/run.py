"""Measures the package's speed beside that of others; see `speed/driver.py`, or --help."""

from __future__ import annotations

from speed.driver import main

if __name__ == "__main__":
    raise SystemExit(main())
