"""The training run: set-up, loop, optimizer, evaluation, checkpoints, reports."""
