"""What a run says: progress bar, lines, metrics.jsonl, trackers, thoughts, warnings."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.config import Config
from quietstar.metrics import ThoughtMetrics
from quietstar.outputs import QuietStarOutput

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """What one step gave.

    Attributes:
        step: Steps done, this one included.
        loss: Of the whole step.
        metrics: Of the whole step.
        norms: Gradient norms by group and in total, before clipping.
        lr: Learning rate of the language model in this step.
    """

    step: int
    loss: Tensor
    metrics: ThoughtMetrics | None
    norms: Mapping[str, Tensor]
    lr: float


@dataclass(frozen=True)
class Alarm:
    """A figure that says that training goes wrong, and what helps."""

    name: str
    is_bad: Callable[[float], bool]
    message: str


ALARMS = (
    Alarm(
        "entropy",
        lambda x: x < 0.05,
        "thoughts have almost no entropy ({value:.3f} nats a token): they collapse to one text. "
        "Raise loss.entropy_weight or thoughts.temperature, or lower loss.policy_weight.",
    ),
    Alarm(
        "distinct",
        lambda x: x < 0.3,
        "thoughts repeat themselves ({value:.2f} distinct tokens a token). "
        "Raise loss.entropy_weight or lower loss.policy_weight.",
    ),
    Alarm(
        "alike",
        lambda x: x > 0.9,
        "at {value:.0%} of the positions all thoughts are the same, so REINFORCE has no signal. "
        "Raise thoughts.temperature, thoughts.num_thoughts or loss.entropy_weight.",
    ),
    Alarm(
        "mixing_weight",
        lambda x: abs(x) < 0.002,
        "the mixing weight fell to {value:.4f}: thoughts no longer reach the prediction. "
        "Set mixing_head.floor or warmup_steps, or raise loss.thought_weight.",
    ),
)
_SILENT_STEPS = 20
"""Steps before an alarm may sound: a head of activation none starts at weight zero."""


class Reporter:
    """Writes on the main process only; elsewhere every call does nothing.

    Args:
        config: Of the run.
        accelerator: Whose trackers get the metrics.
        tokenizer: To show thoughts.
        start_step: Steps already done.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        start_step: int = 0,
    ) -> None:
        self.config, self.accelerator, self.tokenizer = config, accelerator, tokenizer
        self.active = accelerator.is_main_process
        self.console = Console(stderr=False, highlight=False)
        self.path = Path(config.training.output_dir) / METRICS_FILE
        if self.active and start_step > 0:
            forget_later(self.path, start_step)
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self._sounded: set[str] = set()
        self._began = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not (self.active and self.console.is_terminal),
        )
        self._task = self._progress.add_task(
            "training", total=config.training.steps, completed=start_step, figures=""
        )

    def __enter__(self) -> Reporter:
        """Show the progress bar."""
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the progress bar away."""
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line, above the progress bar."""
        if self.active:
            self.console.print(Text(text), soft_wrap=True)

    # --- Steps ------------------------------------------------------------------------------------

    def step_begins(self) -> None:
        """Start the clock of a step."""
        self._began = time.perf_counter()

    def step_ends(self, record: StepRecord, output: QuietStarOutput) -> None:
        """Report a step: bar, file, trackers, alarms, now and then a thought."""
        self._progress.advance(self._task)
        if not self.active or not self._is_due(record.step, self.config.logging.log_every):
            return
        assert record.metrics is not None, "a training step has metrics"
        figures = {
            "loss": record.loss.item(),
            **record.metrics.means(),
            **self._optimizer_figures(record),
            **self._speed(record.metrics),
        }
        self._write("train", record.step, figures)
        self._show(record.step, figures)
        if record.step > _SILENT_STEPS:
            self._sound_alarms(record.step, figures)
        if self._is_due(record.step, self.config.logging.thought_every):
            self._show_thought(output)

    def _is_due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.config.training.steps)

    def _optimizer_figures(self, record: StepRecord) -> dict[str, float]:
        norms = {f"grad_norm_{name}": norm.item() for name, norm in record.norms.items()}
        return {**norms, "lr": record.lr}

    def _speed(self, metrics: ThoughtMetrics) -> dict[str, float]:
        seconds = time.perf_counter() - self._began
        thoughts, data = self.config.thoughts, self.config.data
        text_tokens = self.config.training.batch_size * data.seq_len
        return {
            "seconds": seconds,
            "text_tokens_per_second": text_tokens / seconds,
            "thought_tokens_per_second": text_tokens * thoughts.num_thoughts * thoughts.length
            / seconds,
            "peak_memory_mb": peak_memory_mb(),
        }  # fmt: skip

    def _show(self, step: int, figures: Mapping[str, float]) -> None:
        text = (
            f"base {figures['base_nll']:.3f}  mixed {figures['mixed_nll']:.3f}  "
            f"gain {figures['gain']:+.4f}  w {figures['mixing_weight']:.3f}  "
            f"entropy {figures['entropy']:.2f}  {figures['seconds']:.1f} s/step"
        )
        self._progress.update(self._task, figures=text)
        if not self.console.is_terminal:
            self.say(f"step {step:>5}/{self.config.training.steps}  {text}")

    def _sound_alarms(self, step: int, figures: Mapping[str, float]) -> None:
        for alarm in ALARMS:
            value = figures.get(alarm.name)
            if value is not None and alarm.name not in self._sounded and alarm.is_bad(value):
                self._sounded.add(alarm.name)
                self.say(f"warning: step {step}: {alarm.message.format(value=value)}")

    def _show_thought(self, output: QuietStarOutput) -> None:
        assert output.thoughts is not None
        assert output.input_ids is not None
        place = output.thoughts.shape[2] // 2
        before = self.tokenizer.decode(output.input_ids[0, max(0, place - 15) : place + 1])
        thought = self.tokenizer.decode(output.thoughts[0, 0, place])
        self.say(f"thought after {before!r}: {thought!r}")

    # --- Evaluations ------------------------------------------------------------------------------

    @contextmanager
    def evaluating(self, num_batches: int) -> Iterator[Callable[[], None]]:
        """A second bar; yields what advances it."""
        task = self._progress.add_task("evaluating", total=num_batches, figures="")
        try:
            yield lambda: self._progress.advance(task)
        finally:
            self._progress.remove_task(task)

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Report a held-out evaluation."""
        self.evaluations.append((step, figures))
        if not self.active:
            return
        self._write("eval", step, figures)
        self.console.print(evaluation_table(self.evaluations))

    def _write(self, kind: str, step: int, figures: Mapping[str, float]) -> None:
        record = {"kind": kind, "step": step, **figures}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.accelerator.log({f"{kind}/{k}": v for k, v in figures.items()}, step=step)


def forget_later(path: Path, step: int) -> None:
    """Drop the records after ``step``: a resumed run writes them again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")


def evaluation_table(evaluations: list[tuple[int, dict[str, float]]]) -> Table:
    """Held-out figures by step; the gain of content stands beside the gain."""
    columns = {
        "base_nll": "base NLL",
        "mixed_nll": "mixed NLL",
        "thought_nll": "thought NLL",
        "gain": "gain",
        "gain_of_content": "gain of content",
        "gain_over_pause": "over pause",
        "mixing_weight": "weight",
    }
    table = Table("step", *columns.values(), title="held out, nats a token")
    for step, figures in evaluations:
        signed = ("gain", "gain_of_content", "gain_over_pause")
        cells = [f"{figures[k]:+.4f}" if k in signed else f"{figures[k]:.4f}" for k in columns]
        table.add_row(str(step), *cells)
    return table


def peak_memory_mb() -> float:
    """Most memory held so far: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
