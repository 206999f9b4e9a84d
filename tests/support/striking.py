"""Signals at a chosen moment, sent by the process to itself."""

from __future__ import annotations

import os
import signal


def strike_at(monkeypatch, owner, name, call, number=signal.SIGTERM):
    """Send `number` to this process at the `call`-th call of `owner.name`."""
    real = getattr(owner, name)
    calls = iter(range(1, 100_000))

    def striking(*arguments, **keywords):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, striking)
