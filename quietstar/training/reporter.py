"""What a run says: progress bar, lines, tables, metrics.jsonl, trackers, thoughts, warnings."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from quietstar.config import Config, ThoughtsConfig
from quietstar.distributed import from_main_process
from quietstar.errors import UserError, reason_of, visible
from quietstar.evaluation.controls import GAINS, MADE, SWAPPED
from quietstar.evaluation.metrics import METRICS
from quietstar.model.outputs import QuietStarOutput, decode_thoughts
from quietstar.system import files
from quietstar.system.signals import Stopped
from quietstar.training.costs import TimeLeft, duration
from quietstar.training.guards import GuardState, Source, measures_answers
from quietstar.training.stages import Stage

METRICS_FILE, THOUGHTS_FILE = "metrics.jsonl", "thoughts.jsonl"
LOG_LINES = 200  # of steps, about, where there is no terminal to show a bar
IN_LINE = (
    ("loss", "loss", ".3f"), ("base", "base_nll", ".3f"), ("thought", "thought_nll", ".3f"),
    ("mixed", "mixed_nll", ".3f"), ("gain", "gain", "+.4f"), ("reward", "policy_reward", "+.3f"),
    ("w", "mixing_weight", ".3f"), ("entropy", "entropy", ".3f"), ("lr", "lr", ".1e"),
)  # fmt: skip
"""Metrics of a step in the line under the bar: name, key and format."""
DROPPED_FIRST = ("entropy", "w", "mixed", "lr")
PAUSE_AFTER_REPORT = 30
"""The page is written again after this many times the time that it took: at most 3% of the run."""
SECONDS_OF_REPORT = 0.3  # until one has been timed
_NOT_WITH_ANSWERS = {
    "base_nll",
    "mixed_nll",
    "thought_nll",
    "mixing_weight",
    *(GAINS[name] for name in MADE),
    *(f"gold_probability_{name}" for name in MADE),
}
"""Columns that make room for those of answers."""
_GAIN_COLUMNS = {"gain", GAINS[SWAPPED]}
_PROBABILITY_COLUMNS = {key for key in METRICS if key.startswith("gold_probability")}
"""A table has the ones or the others (`measures_answers`)."""


class _Left(ProgressColumn):
    """Time to the end of a task; rich's own estimate forgets what is older than 30 seconds."""

    def render(self, task: Task) -> Text:
        """Show the seconds that the task's function ``left`` returns."""
        seconds = task.fields["left"]()
        return Text("-:--:--" if seconds is None else str(timedelta(seconds=round(seconds))))


class _Bars(Progress):
    """Bars, and below them the metrics of the newest step in a line of their own.

    In a notebook they are redrawn in one output, which rich does only with ipywidgets.
    """

    metrics = ""
    output: Any = None

    def start(self) -> None:
        """Show the bars."""
        super().start()
        if self.console.is_jupyter:
            self.output = import_module("IPython.display").display(self, display_id=True)

    def refresh(self) -> None:
        """Draw the bars anew."""
        super().refresh()
        if self.output is not None:
            self.output.update(self)

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield what is drawn, from top to bottom."""
        yield self.make_tasks_table(self.tasks)
        if self.metrics:
            yield Text(self.metrics, no_wrap=True, overflow="ellipsis")


class Reporter:
    """Reports a run on the main process; on the others every call does nothing.

    It begins after ``start_step`` steps, and is a context: inside, a terminal or a notebook has a
    bar. ``on_report`` is called with the run folder and a sentence on how far the run is, after
    reported steps and held-out evaluations, as long as it takes at most 3% of the time. A disk that
    fails does not end the run: what cannot be written is said, and records are kept until they can.

    Attributes:
        evaluations: Steps and metrics of the stage's evaluations in this process.
        has_evaluation: True if the step that the run goes on from was evaluated.
        collapse: What the first guard of collapse that fired in this stage and process said; None
            before, and on processes other than the main one.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        stages: Sequence[Stage],
        start_step: int = 0,
        on_report: Callable[[Path, str], object] | None = None,
    ) -> None:
        self.accelerator, self.tokenizer, self.on_report = accelerator, tokenizer, on_report
        self.stage, self._names = stages[0], [stage.name for stage in stages]
        self._total = stages[-1].last_step
        self.active = accelerator.is_main_process
        self.console = Console(stderr=False, highlight=False)
        self._has_bar = self.console.is_terminal or self.console.is_jupyter
        self.path = Path(config.training.output_dir) / METRICS_FILE
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self.has_evaluation = False
        self.collapse: str | None = None
        self._unwritten: list[str] = []
        self._warned: set[str] = set()
        self._guards = GuardState()
        self._step, self._evaluated, self._time_left = start_step, -1, TimeLeft(stages)
        self._step_began = time.perf_counter()
        self._last_event = self._step_began  # the end of a step or an evaluation
        self._report_due = self._step_began + PAUSE_AFTER_REPORT * SECONDS_OF_REPORT
        self._num_records = self._num_reported = 0  # of this process, and in the page
        self._headings: list[str] = []  # of the held-out metrics that were printed last
        self.bar = _Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            _Left(),
            console=self.console,
            disable=not (self.active and self.console.is_terminal),
        )
        self._task = self.bar.add_task(
            "training", total=self._total, completed=start_step, left=self.seconds_left
        )

    def __enter__(self) -> Reporter:
        """Show the bar."""
        if self.active:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Hide the bar; the page of a run that fails says that it has stopped."""
        self.bar.stop()
        failed = kind is not None and not issubclass(kind, Stopped)  # which saves before it reports
        if failed and self._num_records > 0:  # else nothing has been done in the folder
            self.report("stopped")

    def _take_time(self) -> float:
        """Return the seconds since the last step or evaluation ended, and start the next ones."""
        before, self._last_event = self._last_event, time.perf_counter()
        return self._last_event - before

    def seconds_left(self) -> float | None:
        """Return the predicted time to the end of the run; None before anything was timed."""
        done = self._step - self.stage.first_step
        left = self._time_left(self.stage.index, done, self._evaluated)
        return None if left is None else max(0.0, left - (time.perf_counter() - self._last_event))

    def go_on(self, stage: Stage, step: int) -> None:
        """Takes up an earlier run after so many of its steps: drops the records that come again.

        Guards that have fired in this stage stay silent. To be called on all processes, when
        nothing can stop the run from going on.
        """

        def take_up() -> bool:
            is_inside = stage.first_step < step < stage.last_step  # else evaluations come again

            def is_kept(record: dict[str, Any]) -> bool:
                is_earlier = record["stage"] in self._names[: stage.index]
                is_of_step = "train" in (record["kind"], record.get("source"))
                is_known = is_of_step or is_earlier or is_inside
                return record["step"] < step or (record["step"] == step and is_known)

            records, num_damaged = read_metrics(self.path)
            kept = [record for record in records if is_kept(record)]
            if len(kept) < len(records) or num_damaged:
                lines = [json.dumps(record) + "\n" for record in kept]
                files.write_whole(self.path, "".join(lines))
            if num_damaged:
                self.say(f"--resume: damaged lines of {self.path} are dropped: {num_damaged}")
            for record in (record for record in kept if record["stage"] == stage.name):
                if record["kind"] == "guard":
                    self._guards.fired.add(record["name"])
                else:
                    self._guards.see(record["kind"], record["step"], record)
            at = (stage.name, step, "eval")
            return any((r["stage"], r["step"], r["kind"]) == at for r in kept)

        # All processes have to know, since they evaluate together.
        self.has_evaluation = from_main_process(self.accelerator, take_up)
        self._evaluated = step - stage.first_step - (not self.has_evaluation)

    def say(self, text: str) -> None:
        """Prints one line, above the progress bar."""
        if self.active:
            self._print(Text(visible(text)))

    def _print(self, line: Text) -> None:
        """Prints a line: whole into a file, and on a terminal broken between words."""
        self.console.print(line, soft_wrap=not self.console.is_terminal)

    def warn_once(self, name: str, text: str) -> None:
        """Prints a warning of this name, once a stage."""
        if name not in self._warned:
            self._warned.add(name)
            self.say(f"warning: {text}")

    def begin_stage(self, stage: Stage, lines: Sequence[str]) -> None:
        """Says what begins; metrics belong to this stage from now on."""
        self.stage, self._evaluated = stage, -1
        self._last_event = time.perf_counter()
        self.collapse, self._guards = None, GuardState(stage.config, stage.first_step)
        self._warned.clear()
        self.evaluations.clear()
        self._headings.clear()
        self.bar.update(self._task, description=visible(stage.name))
        if len(self._names) > 1:
            self.say(f"stage {stage.index + 1} of {len(self._names)}: {stage.name}")
        for line in lines:
            self.say(line)

    def step_begins(self) -> None:
        """Starts the clock of a step."""
        self._step_began = time.perf_counter()

    def is_step_due(self, step: int) -> bool:
        """Returns True if the metrics of a step are reported; the same on all ranks."""
        return self._is_due(step, self.stage.config.logging.logging_steps)

    def _is_due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.stage.last_step)

    def step_ends(
        self,
        step: int,
        loss: float,
        norms: Mapping[str, float],
        lr: float,
        output: QuietStarOutput,
        num_positions: int = 0,
        num_text_tokens: int = 0,
        judged: tuple[float, int] | None = None,
        thoughts: ThoughtsConfig | None = None,
    ) -> None:
        """Reports a step: bar, file, trackers, guards, now and then a thought.

        ``step`` counts those of the run, this one included. Gradient norms are by group and in
        total, before clipping; loss and metrics of the output, and the numbers of positions that
        thought and of text tokens, are those of the whole step. ``judged`` has the seconds and the
        tokens that the judge of this process took, if there is one; ``thoughts`` are the settings
        by which the step thought, where they are not those of the stage.
        """
        self.bar.advance(self._task)
        self._step = step
        self._time_left.times["step", self.stage.index].append(self._take_time())
        if not self.active or not self.is_step_due(step):
            return
        assert output.metrics is not None, "a training step has metrics"
        seconds, config = time.perf_counter() - self._step_began, self.stage.config
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            unit = 2**20 if sys.platform == "darwin" else 2**10
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        metrics = {
            "loss": loss,
            **output.metrics.means(),
            **{f"grad_norm_{name}": norm for name, norm in norms.items()},
            "lr": lr,
            "seconds": seconds,
            "text_tokens_per_second": num_text_tokens / seconds,
            "peak_memory_mb": peak,
        }
        if self.stage.thinks:
            now = thoughts or config.thoughts
            num_tokens = num_text_tokens * now.num_thoughts * now.length
            counted = output.metrics.sums
            if "teacher_tokens" in counted:
                num_tokens = int(counted["teacher_tokens"][0])
            elif config.thoughts.positions != "all" or "thought_length" in metrics:
                num_tokens = int(counted["thought_logprob"][1])
            metrics["thought_tokens_per_second"] = num_tokens / seconds
            if config.thoughts.positions != "all":
                metrics["positions_per_text"] = num_positions / config.training.global_batch_size
            if config.thoughts.schedule:
                metrics["length_limit"] = float(now.length)
                metrics["lookahead"] = float(now.lookahead)
        if judged is not None and judged[1]:
            metrics["judge_share"] = judged[0] / seconds
            metrics["judged_tokens_per_second"] = judged[1] / judged[0]
        self._write("train", step, metrics)
        text = self._line(metrics)
        self.bar.metrics = text
        self.bar.refresh()
        if not self._has_bar and self._is_due(step, max(1, self._total // LOG_LINES)):
            left = self.seconds_left()
            left = "" if left is None or step == self._total else f"  {duration(left)} left"
            self.say(f"step {step:>5}/{self._total}  {text}{left}")
        self._watch("train", step, metrics)
        if self._is_due(step, config.logging.thought_steps):
            self._show_thought(output)

    def _line(self, metrics: Mapping[str, float]) -> str:
        """Says the metrics of a step in a line, which fits a terminal as far as it can."""
        is_gain = self.stage.config.loss.reward in ("thought", "mixed")
        parts = {
            name: f"{name} {metrics[key]:{form}}"
            for name, key, form in IN_LINE
            if key in metrics and (key != "policy_reward" or not is_gain)
        }
        parts["s/step"] = f"{metrics['seconds']:.1f} s/step"
        for name in DROPPED_FIRST:
            if self._has_bar and len("  ".join(parts.values())) > self.console.width:
                parts.pop(name, None)
        return "  ".join(parts.values())

    def _show_thought(self, output: QuietStarOutput) -> None:
        if output.thoughts is None or output.input_ids is None:
            return
        place = position = output.thoughts.shape[1] // 2
        if output.positions is not None:
            place = int((output.positions[0] >= 0).sum()) // 2
            position = max(0, int(output.positions[0, place]))
        before = self.tokenizer.decode(output.input_ids[0, max(0, position - 15) : position + 1])
        thought = decode_thoughts(self.tokenizer, output.thoughts[0, place, 0])
        self.say(f"thought after {before!r}: {thought!r}")

    @contextmanager
    def evaluating(self, num_texts: int, num_parts: int) -> Iterator[Callable[[], None]]:
        """Shows a second bar, or says what takes so long; yields what is called after each part."""
        began, done = time.perf_counter(), 0
        times = self._time_left.times["evaluation", self.stage.index]
        if not self._has_bar:
            about = f", about {duration(times[-1])}" if times else ""
            self.say(f"evaluating on {num_texts} held-out texts{about}")

        def advance() -> None:
            nonlocal done
            if done > 0:
                times.pop()
            done += 1  # from the first part on, its time predicts that of the others
            times.append((time.perf_counter() - began) * num_parts / done)
            self.bar.advance(task)
            self.bar.refresh()

        def left() -> float | None:
            return max(0.0, times[-1] - (time.perf_counter() - began)) if times else None

        task = self.bar.add_task("evaluating", total=num_parts, left=left)
        try:
            yield advance
        finally:
            self.bar.remove_task(task)
            self.bar.refresh()

    def evaluation(
        self, step: int, metrics: dict[str, float], samples: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Reports a held-out evaluation, with thoughts in texts that are the same each time."""
        self.evaluations.append((step, metrics))
        self._evaluated = step - self.stage.first_step
        self._take_time()
        if not self.active:
            return
        self._write("eval", step, metrics)
        if samples:
            self._write_thoughts(step, samples)
        self._say_evaluation()
        self._watch("eval", step, metrics)
        self.refresh()

    def _watch(self, source: Source, step: int, metrics: Mapping[str, float]) -> None:
        """Records and says which guards fire at a record's metrics, each once a stage."""
        for guard in self._guards.see(source, step, metrics):
            value = self._guards.value(guard)
            assert value is not None, f"{guard.name} has fired"
            message = guard.describe(value, self.stage.config)
            texts = {"name": guard.name, "source": source, "message": message}
            self._guards.fired.add(guard.name)
            self._write("guard", step, {"value": value}, texts)
            self.say(f"warning: step {step}: {message}")
            if guard.is_collapse and self.collapse is None:
                self.collapse = f"{guard.name}: {message}"

    def refresh(self) -> None:
        """Has the page written if there is something new and that has not just taken long."""
        began = time.perf_counter()
        if self._num_records > self._num_reported and began >= self._report_due:
            self.report()
            now = time.perf_counter()
            self._report_due = now + PAUSE_AFTER_REPORT * (now - began)

    def report(self, state: str = "running") -> bool:
        """Has the page written; returns False if it could not be, which ends no run.

        The state is running, stopped or finished.
        """
        if not self.active or self.on_report is None:
            return False
        parts = [f"{state}, step {self._step} of {self._total}"]
        if state == "running":
            if (left := self.seconds_left()) is not None:
                parts.append(f"about {duration(left)} left")
            parts.append(f"as of {time.strftime('%Y-%m-%d %H:%M')}")
        try:
            self.on_report(self.path.parent, ", ".join(parts))
            self._num_reported = self._num_records
        except Exception as problem:
            self.say(f"warning: the report is not written: {reason_of(problem)}")
            return False
        return True

    def _say_evaluation(self) -> None:
        """Prints the newest held-out metrics as a line, under headings at the first of a stage."""
        step, metrics = self.evaluations[-1]
        of_answers = measures_answers(self.stage.config, metrics)
        left_out = _GAIN_COLUMNS if of_answers else _PROBABILITY_COLUMNS
        if "accuracy_with_thoughts" in metrics:
            left_out = left_out | _NOT_WITH_ANSWERS
        columns = [("step", str(step))]
        columns += [
            (metric.heading, format(metrics[key], metric.column_form))
            for key, metric in METRICS.items()
            if metric.heading and key in metrics and key not in left_out
        ]
        headings = [heading for heading, _ in columns]
        if headings != self._headings:
            self._headings[:] = headings
            first = "probability of the answer" if of_answers else "NLLs and gains in nats/token"
            self.say(f"held out: {first}, accuracies as shares")
            for line in range(2):
                cells = [[*heading.split("\n"), ""][line] for heading in headings]
                self._print_row(cells, headings, style="dim")
        self._print_row([cell for _, cell in columns], headings)

    def _print_row(self, cells: Sequence[str], headings: Sequence[str], style: str = "") -> None:
        """Prints cells under their headings, aligned to the right."""
        widths = [max(8, *map(len, heading.split("\n"))) for heading in headings]
        widths[0] = 6
        row = "  ".join(f"{c:>{width}}" for c, width in zip(cells, widths, strict=True))
        self._print(Text(row, style=style))

    def _write_thoughts(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Adds the thoughts of an evaluation, in the place of those that a resumed run had then."""
        path, now = self.path.with_name(THOUGHTS_FILE), (self.stage.index, step)
        record = {"stage": self.stage.name, "step": step, "samples": list(samples)}
        try:
            is_there = files.file_kind(path) == "file"
            lines = path.read_text("utf-8").splitlines() if is_there else []
            earlier = [line for line in lines if self._is_before(line, now)]
            files.write_whole(path, "\n".join([*earlier, json.dumps(record), ""]))
        except (OSError, UserError, UnicodeDecodeError) as problem:
            self.warn_once("thoughts", f"{path} cannot be written ({reason_of(problem)})")

    def _is_before(self, line: str, now: tuple[int, int]) -> bool:
        """Returns True for a whole line of an evaluation that came before stage and step."""
        with suppress(ValueError, RecursionError, KeyError, TypeError):
            record = json.loads(line)
            return (self._names.index(record["stage"]), record["step"]) < now
        return False

    def _write(
        self, kind: str, step: int, metrics: Mapping[str, float], texts: Mapping[str, str] = {}
    ) -> None:
        shown = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        record = {"kind": kind, "stage": self.stage.name, "step": step, **texts, **shown}
        had_failed = bool(self._unwritten)
        self._num_records += 1
        self._unwritten.append(json.dumps(record) + "\n")
        try:
            files.append(self.path, "".join(self._unwritten))
            self._unwritten.clear()
            if kind != "guard":
                self.accelerator.log({f"{kind}/{k}": v for k, v in metrics.items()}, step=step)
        except OSError as problem:
            if not had_failed:
                self.say(
                    f"warning: step {step}: {self.path} or a tracker cannot be written "
                    f"({reason_of(problem)}); training goes on, and tries again"
                )


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Reads the records of a metrics.jsonl; returns them and the number of damaged lines.

    The last line, which an interrupt may have cut, is no damage.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    records: list[dict[str, Any]] = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if (
                isinstance(record, dict)
                and record.get("kind") in ("train", "eval", "guard")
                and type(record.get("step")) is int
                and (record["kind"] != "guard" or isinstance(record.get("name"), str))
            ):
                records.append({"stage": "", **record})
    return records, len(lines) - len(records)
