"""The training run: set-up, loop, optimiser, evaluation, checkpoints, logging."""
