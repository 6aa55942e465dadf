"""The state of one stage of a run, and the request to stop it.

Schedulers warn with SIGTERM or SIGUSR1 before they kill. The step under way is then finished, a
checkpoint is saved, and the process ends with `EXIT_PREEMPTED`. The file ``preempted`` in the run
folder says the same to launch scripts, since launchers replace the exit codes of their processes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from quietstar.config import Config
from quietstar.data import EvalData, TrainData
from quietstar.distributed import Strategy
from quietstar.training.reporter import Reporter
from quietstar.training.stages import Stage

PREEMPTED_FILE = "preempted"


@dataclass
class StopRequest:
    """Name of the signal that asked this run to stop, None without one."""

    signal: str | None = None


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
    start_step: int  # steps of the stage already done
    stop: StopRequest

    @property
    def config(self) -> Config:
        """Config of the stage."""
        return self.stage.config

    @property
    def accelerator(self) -> Accelerator:
        """Devices, ranks, precision."""
        return self.strategy.accelerator


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Makes signals ask for a stop instead of killing the process, while it is entered."""
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers
        return
    before = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
