"""One rank's share of every step: which rows it takes, and reading them one step ahead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from quietstar.attention.layout import IGNORE_INDEX
from quietstar.config import ThoughtsConfig
from quietstar.data import Batch, TrainData
from quietstar.sampling.positions import SCORED_RULES, choose_positions, count_positions
from quietstar.training.state import StageRun

T = TypeVar("T")


@dataclass(frozen=True)
class StepBatches:
    """What one rank runs in one optimizer step, in host memory."""

    micro_batches: list[Batch]  # as many on every rank
    counts: Tensor  # of all micro-batches: targets, and tokens that run, (2,)


def read_ahead(run: StageRun) -> Generator[StepBatches, None, None]:
    """Yields this rank's batches of every step to come, each read during the step before."""
    settings, accelerator, first = run.config.training, run.accelerator, run.stage.first_step
    rows = micro_batch_rows(
        settings.global_batch_size, settings.micro_batch_size,
        accelerator.num_processes, accelerator.process_index,
    )  # fmt: skip
    pin = accelerator.device.type == "cuda"
    read = partial(
        read_step, run.train_data, batch_size=settings.global_batch_size, rows=rows, pin=pin
    )
    # Counted over the run: a later stage goes on in the data, and draws other thoughts.
    return prefetched(read, range(first + run.steps_done, run.stage.last_step))


def micro_batch_rows(
    batch_size: int, micro_batch_size: int, num_processes: int, rank: int
) -> list[range]:
    """Returns the rows of the global batch in each of a rank's micro-batches.

    Ranks take contiguous shares that differ by at most one row, and cut them into equally many
    micro-batches: the wrappers' collectives hang if one rank runs another forward pass. So the last
    micro-batches of a smaller share may be empty ranges. A step has at least one row for each rank.
    """

    def part(rows: range, index: int, count: int) -> range:
        return rows[index * len(rows) // count : (index + 1) * len(rows) // count]

    largest_share = -(-batch_size // num_processes)
    count = -(-largest_share // micro_batch_size)
    share = part(range(batch_size), rank, num_processes)
    return [part(share, index, count) for index in range(count)]


def read_step(
    data: TrainData,
    step: int,
    batch_size: int,
    rows: list[range],
    pin: bool,
) -> StepBatches:
    """Reads and tokenizes one rank's micro-batches of a step, and counts their targets and tokens.

    Steps are those of the whole run, from 0, and have ``batch_size`` rows over all ranks. ``pin``
    page-locks the tensors, so that copies to a GPU can overlap with its work.
    """
    batches, counts = [], torch.zeros(2, dtype=torch.long)
    for of_one in rows:
        # In place of an empty micro-batch runs a text without targets, whose loss is zero. The last
        # one is never empty, since parts round down.
        batch = data.batch(step, batch_size, of_one or rows[-1][:1])
        if not of_one:
            labels = torch.full_like(batch.labels, IGNORE_INDEX)
            batch = dataclasses.replace(batch, labels=labels)
        targets = batch.labels[:, 1:] != IGNORE_INDEX
        counts += torch.stack([targets.sum(), torch.tensor(batch.input_ids.numel())])
        if pin:
            names = [field.name for field in dataclasses.fields(batch)]
            batch = Batch(*[getattr(batch, name).pin_memory() for name in names])
        batches.append(batch)
    return StepBatches(batches, counts)


def count_thinking(batch: Batch, thoughts: ThoughtsConfig) -> Tensor:
    """Counts the positions of each text of a batch that think, (batch,)."""
    return count_positions(
        thoughts.positions, thoughts.position_fraction, batch.labels, batch.answers,
        thoughts.lookahead, marked=batch.marked,
    )  # fmt: skip


def choose_places(
    batch: Batch, thoughts: ThoughtsConfig, seed: int
) -> Int[np.ndarray, "batch positions"] | None:
    """Chooses on the host where a batch thinks, which then waits for no device.

    None for all positions, or where the model's own predictions choose.
    """
    if thoughts.positions in SCORED_RULES:
        return None
    chosen = choose_positions(
        thoughts.positions, thoughts.position_fraction, batch.labels,
        answers=batch.answers, marked=batch.marked,
        sample_ids=batch.sample_ids, seed=seed,
    )  # fmt: skip
    return None if chosen is None else chosen.numpy()


def prefetched(read: Callable[[int], T], steps: range) -> Generator[T, None, None]:
    """Yields ``read(step)`` for every step; a background thread reads one step ahead.

    An error of ``read`` is raised at its own step. Close the generator to end the thread.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as executor:
        upcoming = [executor.submit(read, step) for step in steps[:1]]
        for step in steps:
            current = upcoming.pop()
            if step + 1 in steps:
                upcoming.append(executor.submit(read, step + 1))
            yield current.result()
