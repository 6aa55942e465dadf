"""The training loop, on one page. Everything else is a named call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from quietstar.attention.layout import IGNORE_INDEX
from quietstar.config import Config
from quietstar.data import Batch, EvalData, TrainData
from quietstar.distributed import Strategy
from quietstar.errors import Preempted, UserError
from quietstar.model.metrics import ThoughtMetrics
from quietstar.model.outputs import QuietStarOutput
from quietstar.sampling.positions import count_positions
from quietstar.training.checkpoint import save_checkpoint
from quietstar.training.evaluation import evaluate
from quietstar.training.preemption import PREEMPTED_FILE, StopRequest
from quietstar.training.reporter import Reporter, StepRecord
from quietstar.training.stages import Stage


@dataclass
class Run:
    """All that the loop of one stage holds.

    Attributes:
        stage: Which one.
        config: The whole config that holds in it.
        strategy: Wraps the module, exchanges gradients, saves.
        model: The prepared `WrappedModule`, perhaps wrapped by the strategy.
        optimizer: AdamW with the groups of `quietstar.training.optimizer`.
        scheduler: Of its learning rates.
        train_data: Batches by step.
        eval_data: Held-out sequences.
        reporter: Progress bar, metrics.jsonl, trackers.
        start_step: Steps of the stage already done (0 if it is new).
        stop: Whether a signal asked for an end.
    """

    stage: Stage
    config: Config
    strategy: Strategy
    model: torch.nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    train_data: TrainData
    eval_data: EvalData
    reporter: Reporter
    start_step: int = 0
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def accelerator(self) -> Accelerator:
        """Devices, ranks, precision."""
        return self.strategy.accelerator


def train(run: Run) -> None:
    """Train to the last step of the stage, evaluating and saving on the way.

    Raises:
        UserError: The loss or gradient is not finite; no weight has been changed by it.
        Preempted: A signal asked for an end; the step was finished and a checkpoint saved.
    """
    settings = run.config.training
    first = run.stage.first_step
    if run.start_step == 0:
        run.reporter.evaluation(first, evaluate(run))
    for step in range(run.start_step, settings.max_steps):
        run.reporter.step_begins()
        loss, output = accumulate_gradients(run, step)
        done, lr = step + 1, run.optimizer.param_groups[0]["lr"]
        check = partial(check_finite, first + done, loss)
        norms = run.strategy.update(run.model, run.optimizer, run.config.optim.max_grad_norm, check)
        run.scheduler.step()
        run.reporter.step_ends(StepRecord(first + done, loss, output.metrics, norms, lr), output)
        if run.stop.agreed(run.accelerator):
            leave(run, first + done)
        if _due(done, settings.eval_steps) and done < settings.max_steps:
            run.reporter.evaluation(first + done, evaluate(run))
        if _due(done, settings.save_steps) or (settings.save_steps and done == settings.max_steps):
            save_checkpoint(run, first + done)
    run.reporter.evaluation(run.stage.last_step, evaluate(run))


def leave(run: Run, step: int) -> NoReturn:
    """Save a checkpoint and end the run, as a signal asked.

    Raises:
        Preempted: Always.
    """
    folder = save_checkpoint(run, step)
    if run.accelerator.is_main_process:
        marker = Path(run.config.training.output_dir) / PREEMPTED_FILE
        marker.write_text(f"{step}\n", encoding="utf-8")
    raise Preempted(
        f"{run.stop.signal or 'a signal to another process'} asked for an end; step {step} is "
        f"saved in {folder}, --resume auto goes on from there"
    )


def accumulate_gradients(run: Run, step: int) -> tuple[Tensor, QuietStarOutput]:
    """Forward and backward over all micro-batches of a step.

    Every micro-batch divides by the number of valid targets of the whole step, over ranks too, so
    its loss is a plain part of the step's.

    Returns:
        The step's loss on all ranks, and the last micro-batch's output with the step's metrics.
    """
    accelerator = run.accelerator
    batches = list(_micro_batches(run, step))
    num_items, num_thought_items = accelerator.reduce(
        sum(_num_targets(run.config, batch) for batch in batches), "sum"
    )
    total = torch.zeros((), device=accelerator.device)
    metrics: ThoughtMetrics | None = None
    output = QuietStarOutput()
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with run.strategy.accumulate(run.model, last):
            output = run.model(
                "forward",
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                labels=batch.labels,
                num_items_in_batch=num_items,
                answers=batch.answers,
                num_thought_items=num_thought_items,
                sample_ids=batch.sample_ids,
                seed=run.config.training.seed,
                fixed_mixing_weight=_warm_up_weight(run.config, step),
                think=run.stage.thinks,
            )
            assert output.loss is not None, "forward gives a loss"
            run.strategy.backward(output.loss, last)
        total += output.loss.detach()
        metrics = output.metrics if metrics is None else metrics + output.metrics
    assert metrics is not None, "a step has at least one micro-batch"
    output.metrics = metrics.reduced(accelerator)
    return accelerator.reduce(total, "sum"), output  # pyright: ignore[reportReturnType]


def _micro_batches(run: Run, step: int) -> Iterator[Batch]:
    """This rank's part of the step's batch, in pieces."""
    settings = run.config.training
    rank_rows = settings.global_batch_size // run.accelerator.num_processes
    first = run.accelerator.process_index * rank_rows
    for start in range(first, first + rank_rows, settings.micro_batch_size):
        rows = range(start, start + settings.micro_batch_size)
        # Counted over the run: a later stage goes on in the data, and draws other thoughts.
        batch = run.train_data.batch(run.stage.first_step + step, settings.global_batch_size, rows)
        yield batch.to(run.accelerator.device)


def _num_targets(config: Config, batch: Batch) -> Tensor:
    """Next tokens that are targets, and how many of them have a thought before them."""
    thoughts = config.thoughts
    chosen = count_positions(
        thoughts.positions, thoughts.position_fraction, batch.labels, batch.answers
    )
    return torch.stack([(batch.labels[:, 1:] != IGNORE_INDEX).sum(), chosen.sum()])


def _warm_up_weight(config: Config, step: int) -> float | None:
    head = config.mixing_head
    return head.warmup_weight if step < head.warmup_steps else None


def check_finite(
    step: int, loss: Tensor, norms: Mapping[str, Tensor], *, stepped: bool = False
) -> None:
    """Stop before a step that would destroy the weights, or right after it.

    Raises:
        UserError: The loss or a gradient norm is not finite.
    """
    values = {"loss": loss.item()}
    if "total" in norms:
        values["gradient norm"] = norms["total"].item()
    bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        when = "after the step, whose weights are not saved" if stepped else "before the step"
        raise UserError(
            f"step {step}: {', '.join(bad)} is not finite; stopped "
            f"{when}. Lower optim.learning_rate or "
            "optim.max_grad_norm, or resume from an earlier checkpoint."
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
