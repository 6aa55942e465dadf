"""A training run: set up once, then its stages one after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from quietstar.backbone.loading import HUB_ID
from quietstar.config import Config
from quietstar.config.loading import save_config
from quietstar.distributed import WrappedModule, build_strategy, from_main_process
from quietstar.errors import UserError, reading
from quietstar.model.card import model_card
from quietstar.model.markers import initial_vectors
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.saving import check_replaceable
from quietstar.system.processes import leave_launch
from quietstar.system.signals import Stopped, held, listening, noted
from quietstar.training import run_dir
from quietstar.training.build import (
    Job,
    build_accelerator,
    describe,
    notices,
    quiet_libraries,
    set_up,
)
from quietstar.training.checkpoint import (
    OTHER_RUN,
    UNPICKLED,
    check_world,
    find_checkpoint,
    load_checkpoint,
    read_state,
)
from quietstar.training.costs import describe_evaluations, with_eval_sequences
from quietstar.training.ema import START_NAME, WeightAverage
from quietstar.training.evaluation import held_out_figures, write_results
from quietstar.training.loop import leave, train
from quietstar.training.optimizer import build_optimizer
from quietstar.training.reporter import Reporter
from quietstar.training.run_dir import CONFIG_FILE, EMA_FOLDER, FINAL_FOLDER, PREEMPTED_FILE, flat
from quietstar.training.stages import Stage, begin_stage, plan_stages, scheduled, stage_at
from quietstar.training.state import StageRun
from quietstar.training.teaching import TeacherFolder


def run_training(
    config: Config,
    resume: str | None = None,
    allow_changes: bool = False,
    overwrite: bool = False,
    on_report: Callable[[Path, str], object] | None = None,
    more_runs: bool = False,
) -> Path:
    """Trains as ``config`` says; returns the folder of the final model.

    Args:
        config: Config of the whole run.
        resume: ``auto`` (newest checkpoint of the run folder, a new run if there is none), a
            checkpoint folder, or None for a new run.
        allow_changes: Whether to resume also under settings that make the run another one.
        overwrite: Whether a new run may replace one in its folder.
        on_report: Called in the main process with the run folder and how far the run is, in words:
            after steps and held-out evaluations, as long as it takes at most 3% of the time, and at
            the end. The command line writes the page there.
        more_runs: Whether to keep the processes of the launch connected, for another run in them.

    Raises:
        UserError: Any mistake of the user, in one line; nothing is overwritten.
        Preempted: A signal asked the run to stop; a checkpoint is saved.
    """
    quiet_libraries()
    accelerator = build_accelerator(config)
    with listening(), ExitStack() as stack:

        def begin() -> Start:
            return find_start(config, resume, allow_changes, overwrite, stack)

        start = from_main_process(accelerator, begin)
        config = with_eval_sequences(config, start.held_out)
        final = _run(config, accelerator, start, on_report)
    for tracker in accelerator.trackers:
        tracker.finish()
    if not more_runs:
        leave_launch()
    return final


@dataclass(frozen=True)
class Start:
    """Where a run begins, and what is to be said about it."""

    checkpoint: Path | None
    step: int  # of the run
    stage: int  # index of the first one that trains
    goes_on: bool  # the folder's own run, not another in a new folder
    held_out: dict[str, int | None]  # texts of each stage in the run that goes on
    lines: list[str]


def find_start(
    config: Config, resume: str | None, allow_changes: bool, overwrite: bool, stack: ExitStack
) -> Start:
    """Takes the run folder, on the main process, and finds out how the run begins.

    The lock on the folder is entered into ``stack``. Nothing in the folder is changed but by
    tidying up after a kill.

    Raises:
        UserError: The folder is another's or in use, or the run in it cannot be gone on with.
    """
    output_dir = Path(config.training.output_dir)
    run_dir.check_own(output_dir, overwrite)
    run_dir.check_inputs(output_dir, config)
    stack.enter_context(run_dir.hold(output_dir))
    stack.callback(run_dir.drop_unused, output_dir)  # where a mistake ends it
    is_run = run_dir.check_own(output_dir, overwrite)  # again, now that nobody else can change it
    if is_run:
        run_dir.recover(output_dir)
        is_run = run_dir.has_steps(output_dir)  # else nothing is lost by beginning anew
    (checkpoint, remarks), held_out = find_checkpoint(output_dir, resume), {}
    is_own = checkpoint is not None and output_dir.resolve() in checkpoint.resolve().parents
    has_config = (output_dir / CONFIG_FILE).exists()
    if is_own or (resume == "auto" and is_run and has_config):
        held_out, changes = run_dir.check_same_run(output_dir, config, allow_changes)
        remarks = remarks + changes
    if is_own:  # else it is refused or deleted
        averages = config.training.ema_decay is not None
        for name in (FINAL_FOLDER, EMA_FOLDER) if averages else (FINAL_FOLDER,):
            check_replaceable(Path(os.path.abspath(output_dir / name)))
    elif is_run and not overwrite and (resume != "auto" or (output_dir / FINAL_FOLDER).exists()):
        state, remedy = "already holds a run", "Choose another folder, go on with --resume auto, or"
        if resume == "auto":
            state = "holds a finished run without a checkpoint to go on from (as with "
            state += "training.save_steps 0)"
            remedy = "Choose another folder, or"
        raise UserError(
            f"training.output_dir ({output_dir}): {state}. {remedy} replace it with --overwrite."
        )
    stages = plan_stages(config)
    if checkpoint is None:
        begins = f"--resume auto: no checkpoint in {output_dir}, so a new run begins"
        lines = [] if resume is None else [begins]
        return Start(None, 0, 0, False, held_out, [*lines, *(f"--resume: {x}" for x in remarks)])
    state, names, total = read_state(checkpoint), [x.name for x in stages], stages[-1].last_step
    step = state.step
    if state.stage not in ("", *names) and not allow_changes:  # earlier versions named no stage
        raise UserError(
            f"--resume ({checkpoint}): its stage ({state.stage}): must be one of the config "
            f"({', '.join(names)}). Give a checkpoint of this run, or insist with "
            "--allow-changes true."
        )
    if step > total:
        raise UserError(
            f"training.max_steps: the run has {total} steps, but {checkpoint} is after {step}. "
            "Set at least as many, or give an earlier checkpoint."
        )
    # A stage may have been stopped before its first step.
    named = [x for x in stages if x.name == state.stage and x.first_step <= step <= x.last_step]
    first = named[0] if named else stage_at(stages, step)
    where = f", stage {first.name}" if len(stages) > 1 else ""
    begins = f"going on from {checkpoint}, step {step} of {total}{where}"
    if step == total:
        begins = f"{checkpoint} already has all {total} steps; it is evaluated"
    lines = [f"--resume: {text}" for text in (begins, *remarks)]
    return Start(checkpoint, step, first.index, is_own, held_out, lines)


def _run(
    config: Config,
    accelerator: Accelerator,
    start: Start,
    on_report: Callable[[Path, str], object] | None,
) -> Path:
    """Sets up, trains all stages and saves, in a folder whose lock is held."""
    began, output_dir = time.perf_counter(), Path(config.training.output_dir)
    strategy, checkpoint, lines = build_strategy(accelerator, config), start.checkpoint, start.lines
    if checkpoint is not None:
        check_world(checkpoint, strategy)
        if strategy.kind in UNPICKLED:
            lines = [
                *lines, f"--resume: {UNPICKLED[strategy.kind]} as pickles, which may run any code: "
                "resume from checkpoints that you trust",
            ]  # fmt: skip
    job = set_up(config, strategy, checkpoint)
    try_own_parts(job)
    check_teachers(job, start.step)

    def take_folder() -> None:
        if accelerator.is_main_process:
            run_dir.mark(output_dir)
            save_config(config, output_dir / CONFIG_FILE)
            (output_dir / PREEMPTED_FILE).unlink(missing_ok=True)

    if not start.goes_on:
        if accelerator.is_main_process:
            run_dir.clear(output_dir)
        take_folder()
    accelerator.wait_for_everyone()
    name = output_dir.resolve().name
    names = {"wandb": {"name": name}, "trackio": {"name": name}, "mlflow": {"run_name": name}}
    accelerator.init_trackers("quietstar", flat(config), names)
    reporter = Reporter(config, accelerator, job.tokenizer, job.stages, start.step, on_report)
    run: StageRun | None = None
    try:
        with reporter, ExitStack() as together:
            for line in lines:
                reporter.say(line)
            for stage in job.stages[start.stage :]:
                # Until the stage stands, there is no state that could be saved.
                with held(run is not None):
                    run = build_stage(job, stage, reporter, checkpoint, run)
                if stage.index == start.stage:
                    # From now on several processes stop together: they agree after a step, and in
                    # evaluations. Before, there is no state of which one could leave a part.
                    together.enter_context(noted(accelerator.num_processes > 1))
                    if start.goes_on:  # now that nothing stops it
                        take_folder()
                        reporter.go_on(stage, start.step)
                        run.saved_step = start.step
                checkpoint = None
                train(run)
            assert run is not None, "a run has at least one stage"
            return finish(job, run, time.perf_counter() - began)
    except Stopped as stop:
        if run is None:
            raise
        leave(run, stop)


def try_own_parts(job: Job) -> None:
    """Tries the user's own parts of later stages on a text, so that a mistake costs no steps.

    Those of the first stage are tried by its first step. Left out are weights that no process holds
    whole, and stages whose losses need another model's predictions.

    Raises:
        UserError: A reward, an objective or a sampler does not do what such parts must.
    """
    if job.strategy.kind != "replicated":
        return
    model, device = job.model, job.strategy.accelerator.device
    for stage in job.stages[1:]:
        model.records = job.data[stage.index][0].records
        loss, thoughts = stage.config.loss, stage.config.thoughts
        names = (loss.reward, loss.objective, thoughts.sampler)
        if not stage.thinks or not any(":" in name for name in names):
            continue
        model.to(device).configure(scheduled(thoughts, 0), loss)
        objective = model.objective
        if objective.student is not None or objective.reads_reference(loss.reward):
            continue
        texts = next(job.data[stage.index][1].batches(1)).to(device)
        with torch.random.fork_rng(devices=[]):
            model.train()(
                texts.input_ids, texts.attention_mask, texts.labels, answers=texts.answers,
                marked=texts.marked, sample_ids=texts.sample_ids,
            )  # fmt: skip


def check_teachers(job: Job, steps_done: int) -> None:
    """Looks for the predictions that stages learn from, so that what is missing costs no steps.

    Raises:
        UserError: They are not there, of another tokenizer, or not of the texts of the run.
    """
    for stage in job.stages:
        steps = range(max(stage.first_step, steps_done), stage.last_step)
        teacher = open_teacher(job.model, stage) if steps else None
        if teacher is not None and not stage.config.data.streaming:  # which is read once, in order
            batch_size = stage.config.training.global_batch_size
            teacher.check(job.data[stage.index][0], steps, batch_size)


def build_stage(
    job: Job, stage: Stage, reporter: Reporter, checkpoint: Path | None, previous: StageRun | None
) -> StageRun:
    """Makes a stage ready to train, from a checkpoint inside it or from the end of the one before.

    ``previous`` is the stage before, if this process trained it.
    """
    strategy, config = job.strategy, stage.config
    begin_stage(job.model, stage)
    vectors = ()
    if stage.starts_thinking and previous is not None:
        # Now, when the embeddings have learned what the texts mean.
        vectors = previous.model(initial_vectors, job.tokenizer)
    strategy.accelerator.free_memory()  # wrapper and optimizer of the previous stage
    if previous is not None:
        previous.ema = None
    wrapped = strategy.shard(WrappedModule(job.model))
    for name, vector in zip(("start_embedding", "end_embedding"), vectors, strict=bool(vectors)):
        strategy.write(getattr(job.model, name), vector)
    optimizer = build_optimizer(job.model, config.optim, config.tuning)
    prepared, optimizer = strategy.prepare(wrapped, optimizer, config)
    steps_done, decay = 0, config.training.ema_decay
    if checkpoint is not None:
        load_checkpoint(checkpoint, strategy, prepared, optimizer)
        steps_done = read_state(checkpoint).step - stage.first_step
    ema = None if decay is None else WeightAverage(strategy, prepared, decay)
    reference = ema
    objective = job.model.objective
    if not (stage.thinks and objective.reads_reference(config.loss.reward)):
        reference = None
    elif objective.reference == "base":
        reference = WeightAverage(strategy, prepared, 1.0, START_NAME)
    elif ema is None:
        raise UserError(
            f"training.ema_decay (null): must be set, since the reference of loss.objective "
            f"({config.loss.objective}) is that average. Set it, such as to 0.999."
        )
    for key, average in {"training.ema_decay": ema, "loss.reference": reference}.items():
        if checkpoint is None or average is None:
            continue
        with reading(f"--resume ({checkpoint})", OTHER_RUN):
            is_there = average.load(checkpoint, prepared)
        if not is_there:
            reporter.say(
                f"--resume: {checkpoint} holds no weights for {key}, so these begin as they are at "
                "this step"
            )
    train_data, eval_data, report = job.data[stage.index]
    job.model.records = train_data.records
    lines = [report.summary(), describe(job.model, stage)]
    lines += describe_evaluations(stage, len(eval_data))
    reporter.begin_stage(stage, [*lines, *notices(stage, eval_data)])
    prepared.train()
    run = StageRun(stage, strategy, prepared, optimizer, train_data, eval_data, reporter,
                   job.model.objective, steps_done, ema=ema, reference=reference,
                   critic=job.model.judge, teacher=open_teacher(job.model, stage))  # fmt: skip
    if checkpoint is not None and (running := read_state(checkpoint).running) is not None:
        device = run.accelerator.device
        run.running = torch.tensor(running, dtype=torch.float64, device=device)
    return run


def open_teacher(model: QuietStarForCausalLM, stage: Stage) -> TeacherFolder | None:
    """Opens the predictions that a stage learns from, if they are another run's.

    Raises:
        UserError: They are of another tokenizer, or cannot be read.
    """
    name = getattr(stage.config.loss, "teacher", None)
    if name is None:
        return None
    teacher = TeacherFolder(Path(name), "loss.teacher")
    if (size := teacher.settings["vocab_size"]) != model.vocab_size:
        raise UserError(
            f"loss.teacher ({name}): is of a tokenizer with {size:,} tokens, but that of the model"
            f" has {model.vocab_size:,}. Teach with a model of the same tokenizer."
        )
    return teacher


def finish(job: Job, run: StageRun, seconds: float) -> Path:
    """Saves the final model and the results, then reports; returns the model's folder."""
    output_dir, reporter, report = run.reporter.path.parent, run.reporter, ""
    if run.ema is not None:  # before the folder that says that the run is done
        with run.ema.applied(run.model), held():
            weights = job.strategy.full_weights(run.model)
            if reporter.active:
                folder = output_dir / EMA_FOLDER  # its figures are not those of the run
                job.model.save_pretrained(folder, job.tokenizer, state_dict=weights)
    final, weights = output_dir / FINAL_FOLDER, job.strategy.full_weights(run.model)
    with held():
        if reporter.active:
            config = run.config
            facts = {
                "trained on": f"{config.data.train}, as `{config.data.format}`",
                "objective": f"{config.loss.objective} (stage {run.stage.name})",
                "steps": f"{config.training.max_steps} of {config.training.global_batch_size} "
                f"texts, learning rate {config.optim.learning_rate:g}",
                "thoughts a position": str(config.thoughts.num_thoughts),
                "seed": str(config.training.seed),
                "held out": f"{len(run.eval_data)} texts",
            }
            card = model_card(job.model, facts, *held_out_figures(run), hub_data(config))
            job.model.save_pretrained(final, job.tokenizer, state_dict=weights, card=card)
    if reporter.active:
        write_results(run, seconds)
    if reporter.report("finished"):
        report = f"; report: {output_dir / 'report.html'}"
    average = f", its average in {output_dir / EMA_FOLDER}" if run.ema else ""
    reporter.say(f"the model is in {final}{average}; the figures are in {reporter.path}{report}")
    run.accelerator.wait_for_everyone()
    return final


def hub_data(config: Config) -> list[str]:
    """Names the data set that a run read from the hub."""
    name = str(config.data.train).partition(":")[0]
    return [name] if HUB_ID.fullmatch(name) and not Path(name).exists() else []
