"""What a run says: progress bar, lines, metrics.jsonl, trackers, thoughts, warnings."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from quietstar.config import Config
from quietstar.model.metrics import ThoughtMetrics
from quietstar.model.outputs import QuietStarOutput
from quietstar.training.alarms import SILENT_STEPS, sounding
from quietstar.training.held_out_table import evaluation_table
from quietstar.training.metrics_file import METRICS_FILE, forget_later
from quietstar.training.stages import Stage, stage_at

LOG_LINES = 200
"""About how many lines of steps a run writes where there is no terminal to show a bar."""


@dataclass(frozen=True)
class StepRecord:
    """What one step gave.

    Attributes:
        step: Steps done, this one included.
        loss: Loss of the whole step.
        metrics: Metrics of the whole step; over all ranks if the step is due for a report.
        norms: Gradient norms by group and in total, before clipping.
        lr: Learning rate of the language model in this step.
    """

    step: int
    loss: float
    metrics: ThoughtMetrics | None
    norms: Mapping[str, float]
    lr: float


class Reporter:
    """Writes on the main process only; elsewhere every call does nothing.

    Args:
        config: Of the run.
        accelerator: Whose trackers get the metrics.
        tokenizer: To show thoughts.
        stages: Of the run.
        start_step: Steps already done.
        on_report: Called with the run folder after every held-out evaluation.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        stages: Sequence[Stage],
        start_step: int = 0,
        on_report: Callable[[Path], object] | None = None,
    ) -> None:
        self.accelerator, self.tokenizer = accelerator, tokenizer
        self.stage, self._num_stages = stages[0], len(stages)
        self._total = stages[-1].last_step
        self.active = accelerator.is_main_process
        self.console = Console(stderr=False, highlight=False)
        self.path = Path(config.training.output_dir) / METRICS_FILE
        if self.active and start_step > 0:
            forget_later(self.path, start_step, stage_at(stages, start_step))
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self.on_report = on_report
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
            "training", total=self._total, completed=start_step, figures=""
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

    def begin_stage(self, stage: Stage, lines: Sequence[str]) -> None:
        """Say what begins; figures belong to this stage from now on."""
        self.stage = stage
        self._sounded.clear()
        self.evaluations.clear()
        self._progress.update(self._task, description=stage.name)
        if self._num_stages > 1:
            self.say(f"stage {stage.index + 1} of {self._num_stages}: {stage.name}")
        for line in lines:
            self.say(line)

    # --- Steps ------------------------------------------------------------------------------------

    def step_begins(self) -> None:
        """Start the clock of a step."""
        self._began = time.perf_counter()

    def step_ends(self, record: StepRecord, output: QuietStarOutput) -> None:
        """Report a step: bar, file, trackers, alarms, now and then a thought."""
        self._progress.advance(self._task)
        if not self.active or not self.is_step_due(record.step):
            return
        assert record.metrics is not None, "a training step has metrics"
        figures = {
            "loss": record.loss,
            **record.metrics.means(),
            **{f"grad_norm_{name}": norm for name, norm in record.norms.items()},
            "lr": record.lr,
            **self._speed(record.metrics),
        }
        self._write("train", record.step, figures)
        self._show(record.step, figures)
        if record.step - self.stage.first_step > SILENT_STEPS:
            self._sound_alarms(record.step, figures)
        if output.thoughts is not None and self._is_due(
            record.step, self.stage.config.logging.thought_steps
        ):
            self._show_thought(output)

    def is_step_due(self, step: int) -> bool:
        """True if the figures of a step are reported; the same on all ranks."""
        return self._is_due(step, self.stage.config.logging.logging_steps)

    def _is_due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.stage.last_step)

    def _speed(self, metrics: ThoughtMetrics) -> dict[str, float]:
        seconds = time.perf_counter() - self._began
        thoughts, data = self.stage.config.thoughts, self.stage.config.data
        text_tokens = self.stage.config.training.global_batch_size * data.seq_len
        figures = {
            "seconds": seconds,
            "text_tokens_per_second": text_tokens / seconds,
            "peak_memory_mb": peak_memory_mb(),
        }
        if self.stage.thinks:
            thought_tokens = text_tokens * thoughts.num_thoughts * thoughts.length
            if thoughts.positions != "all":
                thought_tokens = int(metrics.counts["reward"]) * thoughts.length
            figures["thought_tokens_per_second"] = thought_tokens / seconds
        return figures

    def _show(self, step: int, figures: Mapping[str, float]) -> None:
        shown = {"base": "base_nll", "mixed": "mixed_nll", "gain": "gain", "w": "mixing_weight"}
        text = "  ".join(
            f"{name} {figures[key]:{'+.4f' if key == 'gain' else '.3f'}}"
            for name, key in {**shown, "entropy": "entropy"}.items()
            if key in figures
        )
        text += f"  {figures['seconds']:.1f} s/step"
        self._progress.update(self._task, figures=text)
        if not self.console.is_terminal and self._is_due(step, max(1, self._total // LOG_LINES)):
            self.say(f"step {step:>5}/{self._total}  {text}")

    def _sound_alarms(self, step: int, figures: Mapping[str, float]) -> None:
        for name, message in sounding(figures):
            if name not in self._sounded:
                self._sounded.add(name)
                self.say(f"warning: step {step}: {message}")

    def _show_thought(self, output: QuietStarOutput) -> None:
        assert output.thoughts is not None
        assert output.input_ids is not None
        place = position = output.thoughts.shape[2] // 2
        if output.positions is not None:
            place = int((output.positions[0] >= 0).sum()) // 2
            position = max(0, int(output.positions[0, place]))
        before = self.tokenizer.decode(output.input_ids[0, max(0, position - 15) : position + 1])
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
        if self.on_report is not None:
            self.on_report(self.path.parent)

    def _write(self, kind: str, step: int, figures: Mapping[str, float]) -> None:
        record = {"kind": kind, "stage": self.stage.name, "step": step, **figures}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.accelerator.log({f"{kind}/{k}": v for k, v in figures.items()}, step=step)


def peak_memory_mb() -> float:
    """Most memory held so far: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
