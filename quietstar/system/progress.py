"""A bar for work whose amount is known."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from quietstar.errors import visible


@contextmanager
def progress(
    task: str, total: int, keep: bool = False, shown: bool = True
) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr, which stays at the end if ``keep``; yields what advances it."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=not keep,
                  disable=not shown) as bars:  # fmt: skip
        bar = bars.add_task(visible(task).replace("\n", "⏎"), total=total)
        yield lambda: bars.advance(bar)
