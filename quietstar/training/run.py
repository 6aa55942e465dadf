"""A training run: set up once, then its stages one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from quietstar.config import Config
from quietstar.config.loading import save_config
from quietstar.distributed import ModelProxy, WrappedModule, build_strategy, from_main_process
from quietstar.training.build import Job, build_accelerator, describe, quiet_libraries, set_up
from quietstar.training.checkpoint import (
    CONFIG_FILE,
    FINAL_FOLDER,
    check_free,
    check_same_run,
    check_world,
    find_checkpoint,
    flat,
    load_checkpoint,
    read_state,
    start_run_dir,
)
from quietstar.training.evaluation import write_results
from quietstar.training.loop import train
from quietstar.training.optimizer import build_optimizer
from quietstar.training.reporter import Reporter
from quietstar.training.stages import Stage, begin_stage, stage_at
from quietstar.training.state import PREEMPTED_FILE, StageRun, StopRequest, listening


def run_training(
    config: Config,
    resume: str | None = None,
    allow_changes: bool = False,
    on_report: Callable[[Path], object] | None = None,
    more_runs: bool = False,
) -> Path:
    """Trains as ``config`` says; returns the folder of the final model.

    Args:
        config: Config of the whole run.
        resume: ``auto`` (newest checkpoint of the run folder, a new run if there is none), a
            checkpoint folder, or None for a new run.
        allow_changes: Whether to resume also under settings that make the run another one.
        on_report: Called in the main process with the run folder when its figures have changed:
            after every held-out evaluation and at the end. The command line writes the page there.
        more_runs: Whether to keep the processes of the launch connected, for another run in them.

    Raises:
        UserError: Any mistake of the user, in one line; nothing is overwritten.
        Preempted: A signal asked the run to stop; a checkpoint is saved.
    """
    began = time.perf_counter()
    quiet_libraries()
    output_dir = Path(config.training.output_dir)
    accelerator = build_accelerator(config)
    find = partial(find_checkpoint, output_dir, resume)
    checkpoint, remarks = from_main_process(accelerator, find)
    is_new = checkpoint is None or output_dir.resolve() not in checkpoint.resolve().parents
    if is_new:
        # A run that was killed before its first checkpoint begins anew.
        is_begun = resume == "auto" and not (output_dir / FINAL_FOLDER).exists()
        check_free(output_dir, config.training.overwrite_output_dir or is_begun)
    else:
        remarks += check_same_run(output_dir, config, allow_changes)
    strategy = build_strategy(accelerator, config)
    steps_done = 0
    if checkpoint is not None:
        check_world(checkpoint, strategy)
        steps_done = read_state(checkpoint)["step"]
    job = set_up(config, strategy)
    if accelerator.is_main_process:
        if is_new:
            start_run_dir(output_dir)
        save_config(config, output_dir / CONFIG_FILE)
        (output_dir / PREEMPTED_FILE).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("quietstar", config=flat(config))
    reporter = Reporter(config, accelerator, job.tokenizer, job.stages, steps_done, on_report)
    with reporter.bar, listening() as stop:
        first, total = stage_at(job.stages, steps_done), job.stages[-1].last_step
        if checkpoint is not None and steps_done >= total:
            reporter.say(f"--resume: {checkpoint} already has all {total} steps; it is evaluated")
        elif checkpoint is not None:
            where = f", stage {first.name}" if len(job.stages) > 1 else ""
            text = f"going on from {checkpoint}, step {steps_done} of {total}{where}"
            reporter.say(f"--resume: {text}")
        elif resume is not None:
            reporter.say(f"--resume auto: no checkpoint in {output_dir}, so a new run begins")
        for remark in remarks:
            reporter.say(f"--resume: {remark}")
        run = run_stage(job, first, reporter, stop, checkpoint=checkpoint)
        for stage in job.stages[first.index + 1 :]:
            run = run_stage(job, stage, reporter, stop, previous=run)
        final = finish(job, run, time.perf_counter() - began)
    for tracker in accelerator.trackers:
        tracker.finish()
    if not more_runs:
        accelerator.state.destroy_process_group()
    return final


def run_stage(
    job: Job,
    stage: Stage,
    reporter: Reporter,
    stop: StopRequest,
    checkpoint: Path | None = None,
    previous: StageRun | None = None,
) -> StageRun:
    """Trains a stage, from a checkpoint inside it or from the end of the stage before."""
    strategy, config = job.strategy, stage.config
    begin_stage(job.model, stage)
    vectors = ()
    if stage.starts_thinking and previous is not None:
        # Now, when the embeddings have learned what the texts mean.
        vectors = ModelProxy(previous.model).initial_vectors(job.tokenizer)
    strategy.accelerator.free_memory()  # wrapper and optimizer of the previous stage
    wrapped = strategy.shard(WrappedModule(job.model))
    for name, vector in zip(("start_embedding", "end_embedding"), vectors, strict=bool(vectors)):
        strategy.write(getattr(job.model, name), vector)
    optimizer = build_optimizer(job.model, config.optim, config.tuning)
    prepared, optimizer = strategy.prepare(wrapped, optimizer, config)
    start_step = 0
    if checkpoint is not None:
        load_checkpoint(checkpoint, strategy, prepared, optimizer)
        start_step = read_state(checkpoint)["step"] - stage.first_step
    train_data, eval_data, report = job.data[stage.index]
    reporter.begin_stage(stage, [report.summary(), describe(job.model, stage)])
    prepared.train()
    run = StageRun(stage, strategy, prepared, optimizer, train_data, eval_data, reporter,
                   start_step, stop)  # fmt: skip
    train(run)
    return run


def finish(job: Job, run: StageRun, seconds: float) -> Path:
    """Saves the final model and the results, then reports; returns the model's folder."""
    output_dir, reporter, report = run.reporter.path.parent, run.reporter, ""
    final, weights = output_dir / FINAL_FOLDER, job.strategy.full_weights(run.model)
    if reporter.active:
        job.model.save_pretrained(final, job.tokenizer, weights=weights)
    write_results(run, job.tokenizer, seconds)
    if reporter.active and reporter.on_report is not None:
        reporter.on_report(output_dir)
        report = f"; report: {output_dir / 'report.html'}"
    reporter.say(f"the model is in {final}; the figures are in {reporter.path}{report}")
    run.accelerator.wait_for_everyone()
    return final
