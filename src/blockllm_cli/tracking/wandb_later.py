"""Sends a run that is over to W&B, by the same process that would have followed it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from blockllm_cli.errors import InputError
from blockllm_cli.recipe.sections import Tracking
from blockllm_cli.tracking.run_folder import METRICS, RunFolder
from blockllm_cli.tracking.wandb_choice import Choice, choose_mode
from blockllm_cli.tracking.wandb_process import Say, Tracker, task_of


def send_run(
    folder: RunFolder, name: str, tracking: Tracking, *, offline: bool, seconds: float, say: Say
) -> Mapping[str, Any]:
    """Make the W&B run of `folder` equal to it.

    What W&B has already is not sent again, so it does no harm to repeat this.

    Args:
        folder: of the run; locked meanwhile.
        name: `run.name`.
        tracking: project, entity, group and tags.
        offline: write files for `wandb sync` and touch no network.
        seconds: give up after this long.
        say: called with lines for the person.

    Returns:
        `id`, `mode`, `url` (online, else None), `rows` (sent now), `files` (W&B's own folder of this).

    Raises:
        InputError: the package, a key or the server is missing, or not all could be sent.
        StorageError: another process is in the folder, or it cannot be written.
    """
    choice = _choice(folder, offline=offline)
    if not (folder.path / METRICS).is_file():
        raise InputError(f"{folder.path} has no {METRICS}: there is nothing to send")
    with folder.locked():
        task = task_of(folder, name, tracking, mode=choice.mode, server=choice.server, goes_on=False, last_seconds=0.0)
        tracker = Tracker.start(task, say, lambda problem: None)
        tracker.finish(seconds)
    if tracker.problem is not None or tracker.report is None:
        raise InputError(f"W&B: {tracker.problem}; {folder.path} is as it was and can be sent again")
    return {"id": task.id, **tracker.report}


def _choice(folder: RunFolder, *, offline: bool) -> Choice:
    choice = choose_mode("offline" if offline else "online", os.environ)
    if choice.mode == "off":
        raise InputError(f"cannot send {folder.path} to W&B: {choice.reason}")
    if choice.mode == "offline" and not offline:
        raise InputError(
            f"cannot send {folder.path} to W&B: {choice.reason}; --offline writes files that `wandb sync` sends later"
        )
    return choice
