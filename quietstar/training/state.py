"""The state of one stage of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from quietstar.config import Config
from quietstar.data import EvalData, TrainData
from quietstar.distributed import Strategy
from quietstar.judging.critic import Critic
from quietstar.objectives import Objective
from quietstar.training.ema import WeightAverage
from quietstar.training.reporter import Reporter
from quietstar.training.stages import Stage
from quietstar.training.teaching import TeacherFolder


@dataclass
class StageRun:
    """Everything that the loop of one stage holds."""

    stage: Stage
    strategy: Strategy  # wraps the module, exchanges gradients, saves
    model: torch.nn.Module  # as the strategy has wrapped it
    optimizer: Optimizer  # with the groups of `quietstar.training.optimizer`
    train_data: TrainData
    eval_data: EvalData
    reporter: Reporter
    objective: Objective
    steps_done: int  # of the stage
    saved_step: int | None = None  # of the run, whose state is in a checkpoint of this folder
    samples: list[dict[str, Any]] = field(default_factory=list)  # of the newest evaluation
    idle_texts: int = 0  # the last ones, which all had no position to think at
    ema: WeightAverage | None = None  # of the weights that train in the stage
    reference: WeightAverage | None = None  # what thoughts are compared with, if anything is
    # Means of rewards and of their standard deviations, for objectives that ask for them.
    running: torch.Tensor | None = None
    critic: Critic | None = None  # what rewards ask about texts, if anything
    teacher: TeacherFolder | None = None  # of another run, for objectives with a student

    @property
    def config(self) -> Config:
        """Config of the stage."""
        return self.stage.config

    @property
    def averages(self) -> list[WeightAverage]:
        """Averages of weights that a checkpoint holds."""
        both = (self.ema, None if self.reference is self.ema else self.reference)
        return [average for average in both if average is not None]

    @property
    def accelerator(self) -> Accelerator:
        """Devices, ranks, precision."""
        return self.strategy.accelerator

    @property
    def step(self) -> int:
        """Steps of the run that are done."""
        return self.stage.first_step + self.steps_done
