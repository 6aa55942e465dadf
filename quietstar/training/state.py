"""The state of one stage of a run, which its loop, evaluations and checkpoints share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from quietstar.config import Config
from quietstar.data import EvalData, TrainData
from quietstar.distributed import Strategy
from quietstar.training.preemption import StopRequest
from quietstar.training.reporter import Reporter
from quietstar.training.stages import Stage


@dataclass
class StageRun:
    """Everything that the loop of one stage holds.

    Attributes:
        stage: Stage that runs.
        config: Config of the stage.
        strategy: Wraps the module, exchanges gradients, saves.
        model: Wrapped module that the strategy prepared.
        optimizer: AdamW with the groups of `quietstar.training.optimizer`.
        train_data: Batches by step.
        eval_data: Held-out sequences.
        reporter: Progress bar, metrics.jsonl, trackers.
        start_step: Steps of the stage already done (0 if it is new).
        stop: Request to stop, set by a signal.
    """

    stage: Stage
    config: Config
    strategy: Strategy
    model: torch.nn.Module
    optimizer: Optimizer
    train_data: TrainData
    eval_data: EvalData
    reporter: Reporter
    start_step: int = 0
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def accelerator(self) -> Accelerator:
        """Devices, ranks, precision."""
        return self.strategy.accelerator
