"""Measurements in processes of their own: none leaves memory or threads to the next."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def in_fresh_process(measure: Callable[..., Result], *arguments: object) -> Result:
    """What a function of a module gives in a new process, which ends by itself and cleans up."""
    with multiprocessing.get_context("spawn").Pool(1, initializer=_quiet) as pool:
        result = pool.apply(measure, arguments)
        pool.close()
        pool.join()
    return result


def _quiet() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in `quietstar.cli.main`
