"""Clocks, memory, and where a figure was measured."""

from __future__ import annotations

import contextlib
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.peak_memory import PeakMemory


def environment() -> dict[str, Any]:
    """Versions, machine, and the commit of a checkout (None elsewhere)."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "machine": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    call = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):  # no git here
        found = subprocess.run(call, capture_output=True, text=True, check=False)
        return found.stdout.strip() or None
    return None


def precision(dtype: str, device: str) -> contextlib.AbstractContextManager:
    """Autocast, or nothing."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def seconds(run: Callable[[], None], repeats: int) -> float:
    """Of one run: the fastest of several."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def in_turn(
    mine: Callable[[], None], floor: Callable[[int], None], batches: Sequence[int], repeats: int
) -> tuple[float, float, int]:
    """Median seconds of both, run in turn, and the rows at once with which the floor is fastest."""
    rows = min(batches, key=lambda rows: seconds(lambda: floor(rows), 2) if batches[1:] else 0)
    times = [(seconds(mine, 1), seconds(lambda: floor(rows), 1)) for _ in range(repeats)]
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    return first, second, rows


def peak_mb(run: Callable[[], object], device: str) -> float:
    """Most memory above that before the first of two runs: resident, or the GPU's allocated."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with PeakMemory() as memory:
        run()
        run()
    return memory.mb
