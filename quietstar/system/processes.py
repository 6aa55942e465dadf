"""The processes of one launch, which share the work of a command."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from quietstar.errors import UserError
from quietstar.system import watch

S = TypeVar("S")
T = TypeVar("T")
PATIENCE = timedelta(days=1)
"""How long a process waits for one that works: as long as the slowest piece of work may take."""
_CONNECTION_LOST = re.compile(
    r"(?i)connection (closed|reset) by peer|socket closed|broken pipe|timed out waiting \d+ms"
)


@dataclass(frozen=True)
class Processes:
    """The processes of ``accelerate launch``; by default there is this one alone.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of all.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one talks to the user and writes files."""
        return self.rank == 0

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Does its own piece of work on every process; returns the results of all, by rank.

        Raises:
            UserError: One of them raised it; it is raised on all, so that none waits for ever.
        """
        if self.count == 1:
            return [work()]
        from accelerate.utils import gather_object

        result, problem = None, None
        try:
            result = work()
        except UserError as error:
            problem = str(error)
        results = gather_object([(result, problem)])
        for _, problem in results:
            if problem is not None:
                raise UserError(problem)
        return [result for result, _ in results]

    def share(self, pieces: Sequence[S], work: Callable[[S], T]) -> Iterator[T]:
        """Does pieces of work, one on each process at a time; yields all results, in order, on all.

        Results should lie in memory, not on a device of their own process.

        Raises:
            UserError: A piece raised it on one of the processes; it is raised on all.
        """
        for start in range(0, len(pieces), self.count):
            turn = pieces[start : start + self.count]
            own = turn[self.rank : self.rank + 1]
            for results in self.gather(lambda own=own: [work(piece) for piece in own]):
                yield from results

    def from_main(self, work: Callable[[], T]) -> T:
        """Does a piece of work on the main process; returns its result on all.

        Raises:
            UserError: The main process raised it.
        """
        return self.gather(lambda: work() if self.is_main else None)[0]  # pyright: ignore


ALONE = Processes()
"""This process, which shares its work with no other."""


def launched_rank() -> int:
    """Return the rank of this process; 0 outside a launch, whatever RANK an environment has."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(rank) if rank.isdecimal() and world.isdecimal() and int(world) > 1 else 0


def is_connection_lost(problem: BaseException) -> bool:
    """Return whether an exchange failed because another process of the launch is not there."""
    return type(problem).__name__.startswith("Dist") or bool(_CONNECTION_LOST.search(str(problem)))


def join_launch(device: str | None = None) -> Processes:
    """Meets the other processes of this launch, if there are any.

    Raises:
        UserError: All would compute on the one GPU that ``device`` names.
    """
    world = os.environ.get("WORLD_SIZE", "")
    if not world.isdecimal() or int(world) < 2:
        return ALONE
    if device is not None and ":" in device:
        raise UserError(
            f"--device ({device}): is one device, and {world} processes were launched, of which "
            "each takes the next. Leave it out."
        )
    import torch
    from accelerate import PartialState

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    watch.watch(state.process_index, state.num_processes)
    return Processes(state.process_index, state.num_processes)


def leave_launch() -> None:
    """Closes this process's connections to the others of its launch, if it has any.

    Call it before the interpreter shuts down. During the shutdown gloo's threads may still release
    tensors and abort the process, and the launcher then reports finished work as a failure.
    """
    watch.stop_watching()
    distributed = sys.modules.get("torch.distributed")  # without it nothing is connected
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
