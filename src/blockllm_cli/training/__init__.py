"""The loop and what it stands on: schedule, precision, evaluation, checkpoints, signals."""
