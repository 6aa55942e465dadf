"""The training loop, on one page. Everything else is a named call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from quietstar.checks import forget, raise_failed
from quietstar.config import ThoughtsConfig
from quietstar.data import Batch
from quietstar.distributed import ModelProxy, from_main_process
from quietstar.errors import Preempted, UserError
from quietstar.losses.distillation import TeacherTargets
from quietstar.model.outputs import QuietStarOutput, ThoughtMetrics
from quietstar.model.scoring import score_reference, teach
from quietstar.sampling.thoughts import ThoughtBatch
from quietstar.system import files
from quietstar.system.signals import Stopped, acknowledge, held, requested
from quietstar.training.batches import StepBatches, choose_places, count_thinking, read_ahead
from quietstar.training.checkpoint import check_finite, checkpoint_folder, save_checkpoint
from quietstar.training.evaluation import NUM_FOLLOWED, evaluate
from quietstar.training.optimizer import set_learning_rates
from quietstar.training.run_dir import PREEMPTED_FILE
from quietstar.training.stages import scheduled
from quietstar.training.state import StageRun

RUNNING_DECAY = 0.9
"""Share of the means over earlier steps that `next_running` keeps."""
MOST_IDLE_TEXTS = 10_000
"""Texts one after the other without a position to think at, of a longer epoch or a stream."""


def train(run: StageRun) -> None:
    """Trains to the last step of the stage, evaluating and saving on the way.

    Raises:
        UserError: The loss, the gradient or a weight is not finite; or the data or the disk fails,
            after a checkpoint was saved if that can be.
        Stopped: A signal asked for an end. A single process stops wherever it is and forgets the
            step under way, whose weights have not changed; several agree after a step.
    """
    settings, optim, first = run.config.training, run.config.optim, run.stage.first_step
    start = run.steps_done
    is_due = settings.eval_steps > 0 and start % settings.eval_steps == 0
    think_as(run, scheduled(run.config.thoughts, max(0, start - 1)))
    if start == 0 or (start < settings.max_steps and is_due and not run.reporter.has_evaluation):
        report_evaluation(run)
    steps = range(start, settings.max_steps)
    with closing(read_ahead(run)) as batches_of_steps:
        for step in steps:
            batches = next_batches(run, batches_of_steps)
            done, last = step + 1, step + 1 == settings.max_steps
            run.reporter.step_begins()
            lr = set_learning_rates(run.optimizer, optim, step, settings.max_steps)
            running = run.running  # of earlier steps, for all updates of this one
            thoughts = think_as(run, scheduled(run.config.thoughts, step))
            output, sums, drawn = accumulate_gradients(run, step, batches, running)
            check = StepCheck(first + done, sums)
            with held():  # the weights and what is known of them change together
                update(run, check)
                for _ in range(1, settings.inner_epochs if run.stage.thinks else 1):
                    again, sums, _ = accumulate_gradients(run, step, batches, running, drawn)
                    update(run, StepCheck(first + done, sums))
                    output.metrics = with_ratios(output.metrics, again.metrics)
                run.steps_done = done
                counts = (check.num_positions, check.num_text_tokens)
                judged = None if run.critic is None else run.critic.take_costs()
                run.reporter.step_ends(
                    first + done, check.loss, check.norms, lr, output, *counts, judged, thoughts
                )
            if check.stop_requested:
                raise acknowledge()
            run.reporter.refresh()
            check_idle_texts(run, first + done, check.num_positions)
            if settings.eval_steps and done % settings.eval_steps == 0 and not last:
                check_finite(run, "it is not evaluated")
                report_evaluation(run)
            if settings.save_steps and (done % settings.save_steps == 0 or last):
                save_checkpoint(run)
            end_if_collapsed(run)
    check_finite(run, "no final model is written")
    report_evaluation(run)
    end_if_collapsed(run)


def report_evaluation(run: StageRun) -> None:
    """Evaluates and reports."""
    figures, run.samples = evaluate(run)
    run.reporter.evaluation(run.step, figures, run.samples[:NUM_FOLLOWED])


def think_as(run: StageRun, thoughts: ThoughtsConfig) -> ThoughtsConfig:
    """Has the model think by these settings of the stage, and returns them."""
    model = ModelProxy(run.model)
    if model.thoughts != thoughts:
        model.configure(thoughts)
    return thoughts


def update(run: StageRun, check: StepCheck) -> None:
    """Changes the weights by what was accumulated, and moves their average."""
    run.strategy.update(run.model, run.optimizer, run.config.optim.max_grad_norm, check)
    if run.ema is not None:
        run.ema.update(run.model)


def next_batches(run: StageRun, batches_of_steps: Iterator[StepBatches]) -> StepBatches:
    """Returns the batches of the next step; where data fails in a single process, saves first.

    Several processes cannot: the others wait in the step, and only their launcher ends them.
    """
    try:
        return next(batches_of_steps)
    except UserError as problem:
        if run.steps_done == 0 or run.accelerator.num_processes > 1 or run.saved_step == run.step:
            raise
        folder = save_checkpoint(run)
        raise UserError(
            f"{problem} Step {run.step} is saved in {folder}; --resume auto goes on from there."
        ) from problem


def check_idle_texts(run: StageRun, step: int, num_positions: int) -> None:
    """Warns of a step whose texts have no position to think at; the same on all ranks.

    Raises:
        UserError: An epoch had none, or as many texts as nobody would wait for.
    """
    run.idle_texts += run.config.training.global_batch_size
    if num_positions or not run.stage.thinks:
        run.idle_texts = 0
        return
    rule = run.config.thoughts.positions
    cause = {"pattern": "thoughts.pattern", "field": "data.positions_field"}.get(
        rule, "data.min_context and data.seq_len"
    )
    if run.idle_texts >= min(run.train_data.epoch or MOST_IDLE_TEXTS, MOST_IDLE_TEXTS):
        raise UserError(
            f"step {step}: the last {run.idle_texts:,} texts have no target that "
            f"thoughts.positions ({rule}) thinks before, so there is nothing to learn from. "
            f"Correct {cause}, or choose other positions."
        )
    run.reporter.warn_once(
        "positions",
        f"step {step}: none of its {run.idle_texts:,} texts has a target that thoughts.positions "
        f"({rule}) thinks before. Check {cause} if this is not rare.",
    )


def end_if_collapsed(run: StageRun) -> None:
    """Ends the run, saved, where a guard of collapse fired and `training.stop_on_collapse` is set.

    The main process, which alone watches, decides for all.

    Raises:
        UserError: One fired in this process.
    """
    if not run.config.training.stop_on_collapse:
        return
    collapse = from_main_process(run.accelerator, lambda: run.reporter.collapse)
    if collapse is None:
        return
    if run.saved_step != run.step:
        save_checkpoint(run)
    folder = checkpoint_folder(Path(run.config.training.output_dir), run.step)
    raise UserError(
        f"training.stop_on_collapse: step {run.step}: {collapse} The step is saved in {folder}: "
        "go on from it or from an earlier checkpoint by --resume, with other settings by "
        "--allow-changes true, and without this end by --training.stop_on_collapse false."
    )


def leave(run: StageRun, stop: Stopped) -> NoReturn:
    """Saves a checkpoint if there is something to save, and ends the run, as a signal asked."""
    if run.step == 0:
        raise Preempted(f"{stop.signal} asked for an end before the first step; start again")
    if run.saved_step != run.step:
        save_checkpoint(run)
    output_dir = Path(run.config.training.output_dir)
    if run.accelerator.is_main_process and requested() != "SIGINT":
        files.write_whole(output_dir / PREEMPTED_FILE, f"{run.step}\n")
    run.reporter.report("stopped")
    run.accelerator.wait_for_everyone()  # a launcher kills rank 0 once another has left
    raise Preempted(
        f"{stop.signal} asked for an end; step {run.step} is saved in "
        f"{checkpoint_folder(output_dir, run.step)}, --resume auto goes on from there"
    )


def accumulate_gradients(
    run: StageRun,
    step: int,
    batches: StepBatches,
    running: Tensor | None = None,
    drawn: Sequence[ThoughtBatch] | None = None,
) -> tuple[QuietStarOutput, Tensor, list[ThoughtBatch]]:
    """Runs forward and backward over all micro-batches of a step.

    Every micro-batch divides by the number of valid targets of the whole step, over ranks too, so
    its loss is a plain part of the step's. Nothing here waits for the device. Steps are those of
    the stage, from 0. ``running`` is as in `ThoughtScores`; with ``drawn``, the thoughts of each
    micro-batch, none are sampled.

    Returns:
        The last micro-batch's output with the step's metrics (over all ranks if the step is
        reported); the sums over ranks of the loss, of requests to stop, of positions and of text
        tokens, (4,); and the thoughts of each micro-batch, if they are needed again.
    """
    accelerator = run.accelerator
    thoughts = ModelProxy(run.model).thoughts
    places = torch.cat([count_thinking(batch, thoughts) for batch in batches.micro_batches])
    counts = torch.cat([batches.counts, places.sum()[None]])
    counts = accelerator.reduce(counts.to(accelerator.device, non_blocking=True), "sum")
    num_items, num_text_tokens, num_thought_items = counts
    head = run.config.mixing_head
    total = torch.zeros((), device=accelerator.device)
    metrics: ThoughtMetrics | None = None
    output, kept = QuietStarOutput(), []
    for index, on_host in enumerate(batches.micro_batches):
        batch = on_host.to(accelerator.device)
        last = index == len(batches.micro_batches) - 1
        given, by_reference = None if drawn is None else drawn[index], None
        teacher = None
        if run.stage.thinks and run.objective.student is not None:
            teacher = ask_teacher(run, batch, on_host)
        elif drawn is None and run.reference is not None and run.stage.thinks:
            given, by_reference = consult_reference(run, batch, on_host)
        with run.strategy.accumulate(run.model, last):
            output = run.model(
                "forward",
                **describe_texts(run, batch, on_host),
                num_items_in_batch=num_items,
                num_thought_items=num_thought_items,
                fixed_mixing_weight=head.warmup_weight if step < head.warmup_steps else None,
                think=run.stage.thinks,
                thoughts=given,
                reference_text=by_reference,
                running=running,
                teacher=teacher,
            )
            assert output.loss is not None, "forward gives a loss"
            run.strategy.backward(output.loss, last)
        if output.drawn is not None and run.config.training.inner_epochs > 1:
            kept.append(output.drawn)
        total += output.loss.detach()
        metrics = output.metrics if metrics is None else metrics + output.metrics
    assert metrics is not None, "a step has at least one micro-batch"
    is_reported = run.reporter.is_step_due(run.stage.first_step + step + 1)
    output.metrics = metrics.reduced(accelerator) if is_reported else metrics
    stop = torch.tensor(float(requested() is not None)).to(total.device, non_blocking=True)
    loss, stops = accelerator.reduce(torch.stack([total, stop]), "sum")
    if drawn is None and run.objective.needs_running and run.stage.thinks:
        run.running = next_running(run, metrics)
    counts = (num_thought_items, num_text_tokens)
    sums = torch.stack([loss, stops, *(x.to(loss.dtype) for x in counts)])
    return output, sums, kept


def describe_texts(run: StageRun, batch: Batch, on_host: Batch) -> dict[str, Any]:
    """Returns what the methods of the model that think about texts are given of these."""
    names = ("input_ids", "attention_mask", "labels", "answers", "marked", "sample_ids")
    seed, thoughts = run.config.training.seed, ModelProxy(run.model).thoughts
    places = choose_places(on_host, thoughts, seed) if run.stage.thinks else None
    return {name: getattr(batch, name) for name in names} | {"seed": seed, "places": places}


def ask_teacher(run: StageRun, batch: Batch, on_host: Batch) -> TeacherTargets | None:
    """Returns what a teacher predicts of a batch; None if the model teaches itself as it is."""
    if run.teacher is not None:
        return run.teacher.find(on_host).to(run.accelerator.device)
    if run.reference is None:
        return None
    with run.reference.applied(run.model):
        return run.model(teach, **describe_texts(run, batch, on_host))


@torch.no_grad()
def consult_reference(
    run: StageRun, batch: Batch, on_host: Batch
) -> tuple[ThoughtBatch | None, Tensor | None]:
    """Has the reference score the texts, and their thoughts if it is compared with in these.

    Returns:
        The thoughts with what the reference says of them and of the texts, or else only the latter.
    """
    assert run.reference is not None, "only called with one"
    spec, thoughts = run.config.thoughts, None
    if run.objective.kl_weight > 0 or run.objective.needs_log_ratio:
        thoughts = run.model(
            "draw",
            **describe_texts(run, batch, on_host),
            num_thoughts=spec.num_thoughts,
            temperature=spec.temperature,
            top_p=spec.top_p,
            top_k=spec.top_k,
        )
    with run.reference.applied(run.model):
        text, tokens = run.model(score_reference, batch.input_ids, batch.labels, thoughts)
    if thoughts is None:
        return None, text
    return replace(thoughts, reference_text=text, reference_logprobs=tokens), None


def next_running(run: StageRun, metrics: ThoughtMetrics) -> Tensor:
    """Moves the means of rewards and of their standard deviations on by a step, (2,)."""
    nothing = (torch.zeros((), device=run.accelerator.device),) * 2
    names = ("policy_reward", "policy_reward_std")
    pairs = [torch.stack([*metrics.sums.get(name, nothing)]) for name in names]
    wide = torch.float32 if pairs[0].device.type == "mps" else torch.float64
    table = run.accelerator.reduce(torch.stack([p.to(wide) for p in pairs]), "sum")
    assert isinstance(table, Tensor)
    sums, counts = table.unbind(1)
    now = sums / counts.clamp(min=1)
    if run.running is None:
        return now
    # A step without a position changes nothing.
    return torch.where(counts > 0, torch.lerp(now, run.running.to(now), RUNNING_DECAY), run.running)


def with_ratios(first: ThoughtMetrics | None, later: ThoughtMetrics | None) -> ThoughtMetrics:
    """Takes the figures of a step's first update, and those of ratios from a later one."""
    assert first is not None, "a training step has metrics"
    assert later is not None, "as has each update"
    names = ("ratio", "approx_kl", "clipped_fraction")
    ratios = {name: later.sums[name] for name in names if name in later.sums}
    return first.joined(ThoughtMetrics(ratios))


class StepCheck:
    """Reads a step's loss, gradient norms and stop requests from the device, all in one transfer.

    Called by the strategy before the weights change where that is possible, so it is also what
    stops a step that would destroy them. ``step`` counts those of the run, this one included;
    ``sums`` are those over ranks of the loss, of requests to stop, of positions and of text tokens.
    """

    def __init__(self, step: int, sums: Tensor) -> None:
        self.loss, self.stop_requested = math.nan, False
        self.num_positions = self.num_text_tokens = 0
        self.norms: dict[str, float] = {}
        self._step, self._sums = step, sums

    def __call__(self, norms: Mapping[str, Tensor], *, stepped: bool = False) -> None:
        """Raises UserError if the loss or the total gradient norm is not finite."""
        # Norms of groups without a gradient are numbers of the host.
        device = self._sums.device
        on_device = [norm.to(device, torch.float32, non_blocking=True) for norm in norms.values()]
        # The only place of a step that waits for the device.
        on_host = torch.stack([*self._sums, *on_device]).tolist()
        self.loss, stops, positions, text_tokens, *values = on_host
        self.num_positions, self.num_text_tokens = int(positions), int(text_tokens)
        self.stop_requested, self.norms = stops > 0, dict(zip(norms, values, strict=True))
        read = {"loss": self.loss, "gradient norm": self.norms.get("total", 0.0)}
        if not math.isfinite(self.loss):
            raise_failed()  # says more, if it was a check on the device
        forget()
        bad = [f"{name} {value}" for name, value in read.items() if not math.isfinite(value)]
        if bad:
            when = "after the step, whose weights are not saved" if stepped else "before the step"
            raise UserError(
                f"step {self._step}: {', '.join(bad)} is not finite; stopped {when}. Lower "
                "optim.learning_rate or optim.max_grad_norm, or resume from an earlier checkpoint."
            )
