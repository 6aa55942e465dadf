"""Setting a run up: everything that can be wrong is wrong here, before the first step."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration, set_seed
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from quietstar.config import Config
from quietstar.config_io import save_config
from quietstar.data import build_data, load_tokenizer
from quietstar.errors import UserError
from quietstar.loading import load_base
from quietstar.model import QuietStarForCausalLM
from quietstar.training.checkpoint import keep_trainable_only, load_checkpoint
from quietstar.training.folder import (
    CONFIG_FILE,
    FINAL_FOLDER,
    TRACKERS_FOLDER,
    check_free,
    check_same_run,
    find_checkpoint,
    flat,
    start_folder,
)
from quietstar.training.loop import Run, train
from quietstar.training.optimizer import build_optimizer, build_scheduler
from quietstar.training.reporter import METRICS_FILE, Reporter


def run_training(config: Config, resume: str | None = None) -> Path:
    """Train as ``config`` says; returns the folder of the final model.

    Args:
        config: The whole config.
        resume: ``auto`` (newest checkpoint of the run folder, a new run if there is none), a
            checkpoint folder, or None for a new run.

    Raises:
        UserError: Whatever the user can mend, in one line; nothing is overwritten.
    """
    quiet_libraries()
    output_dir = Path(config.training.output_dir)
    accelerator = build_accelerator(config)
    checkpoint = find_checkpoint(output_dir, resume)
    is_new = checkpoint is None or output_dir.resolve() not in checkpoint.resolve().parents
    if is_new:
        check_free(output_dir, config.training.overwrite)
    else:
        check_same_run(output_dir, config)
    set_seed(config.training.seed)
    hub = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    tokenizer = _tokenizer(config, hub)
    train_data, eval_data, report = build_data(config.data, tokenizer, config.training.seed)
    model = build_model(config, tokenizer, hub)
    check_positions(config, model)
    if accelerator.is_main_process:
        if is_new:
            start_folder(output_dir)
        save_config(config, output_dir / CONFIG_FILE)
    accelerator.wait_for_everyone()

    optimizer = build_optimizer(model, config.optim)
    scheduler = build_scheduler(optimizer, config.optim, config.training.steps)
    keep_trainable_only(accelerator, model)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    start_step = 0 if checkpoint is None else load_checkpoint(accelerator, checkpoint)
    accelerator.init_trackers("quietstar", config=flat(config))
    with Reporter(config, accelerator, tokenizer, start_step) as reporter:
        reporter.say(report.summary())
        reporter.say(describe(model, config))
        if resume is not None:
            reporter.say(describe_resume(checkpoint, start_step, config))
        prepared.train()
        train(
            Run(config, accelerator, prepared, optimizer, scheduler, train_data, eval_data,
                reporter, start_step)
        )  # fmt: skip
    final = output_dir / FINAL_FOLDER
    if accelerator.is_main_process:
        model.save_pretrained(final, tokenizer)
        reporter.say(f"the model is in {final}; the figures are in {output_dir / METRICS_FILE}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return final


def describe_resume(checkpoint: Path | None, start_step: int, config: Config) -> str:
    """One line about where a run goes on."""
    settings = config.training
    if checkpoint is None:
        return f"--resume auto: no checkpoint in {settings.output_dir}, so a new run begins"
    if start_step >= settings.steps:
        return f"--resume: {checkpoint} already has all {settings.steps} steps; it is evaluated"
    return f"--resume: going on from {checkpoint}, step {start_step} of {settings.steps}"


def quiet_libraries() -> None:
    """Leave the terminal to the run's own progress bar and lines."""
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def build_accelerator(config: Config) -> Accelerator:
    """The accelerator, refusing a world that is not the one launched.

    Raises:
        UserError: Fewer processes than launched see each other, or the batch cannot be cut.
    """
    handlers = []
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.cuda.is_available():
        # Without it every rank believes it is alone, and all write the same files.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    output_dir = Path(config.training.output_dir)
    use_cpu_threads(config.training.cpu_threads)
    check_trackers(config.logging.trackers)
    accelerator = Accelerator(
        mixed_precision=config.training.precision,
        log_with=list(config.logging.trackers) or None,
        project_config=ProjectConfiguration(
            project_dir=str(output_dir), logging_dir=str(output_dir / TRACKERS_FOLDER)
        ),
        kwargs_handlers=handlers,
        step_scheduler_with_optimizer=False,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched but {accelerator.num_processes} see each other; "
            "training would run the same data on each. On CPUs launch with torchrun and "
            "ACCELERATE_USE_CPU=true."
        )
    settings = config.training
    share = settings.micro_batch_size * accelerator.num_processes
    if settings.batch_size % share:
        raise UserError(
            f"training.batch_size ({settings.batch_size}) must be a multiple of "
            f"training.micro_batch_size ({settings.micro_batch_size}) x processes "
            f"({accelerator.num_processes}) = {share}, so that every process has the same work"
        )
    return accelerator


def use_cpu_threads(threads: int | None) -> None:
    """Use the machine's cores: ``accelerate launch`` sets OMP_NUM_THREADS to 1 on its own."""
    if not torch.cuda.is_available():
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(threads or max(1, (cores or 1) // processes))


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that accelerate would leave out in silence.

    Raises:
        UserError: It is unknown to accelerate, or its package is not installed.
    """
    available = {tracker.value for tracker in get_available_trackers()}
    missing = [name for name in names if name not in available]
    if missing:
        known = sorted({tracker.value for tracker in LoggerType} - {"all"})
        remedy = f"pip install {missing[0]}" if missing[0] in known else f"use {', '.join(known)}"
        raise UserError(
            f"logging.trackers: {missing[0]!r} is not available (here are: "
            f"{', '.join(sorted(available)) or 'none'}); {remedy}, or leave it out"
        )


def _tokenizer(config: Config, hub: dict) -> PreTrainedTokenizerBase:
    name = config.model.tokenizer or config.model.name_or_path
    assert name is not None, "the config was validated"
    return load_tokenizer(name, **hub)


def build_model(
    config: Config, tokenizer: PreTrainedTokenizerBase, hub: dict
) -> QuietStarForCausalLM:
    """Load or make the base model and turn it into one that thinks."""
    base = load_base(
        config.model.name_or_path,
        config.model.config,
        dtype=getattr(torch, config.model.dtype),
        vocab_size=len(tokenizer),
        seed=config.training.seed,
        **hub,
    )
    model = QuietStarForCausalLM.from_base(
        base,
        tokenizer=tokenizer,
        thoughts=config.thoughts,
        mixing_head=config.mixing_head,
        loss=config.loss,
        tuning=config.tuning,
    )
    if config.training.activation_checkpointing:
        model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def check_positions(config: Config, model: QuietStarForCausalLM) -> None:
    """Refuse sequences that leave no room for a thought.

    Raises:
        UserError: seq_len + length + lookahead + 1 is more than the model's positions.
    """
    longest = model.max_text_length
    thoughts = config.thoughts
    if longest is not None and config.data.seq_len > longest:
        block = thoughts.length + thoughts.lookahead + 1
        raise UserError(
            f"data.seq_len ({config.data.seq_len}) + thoughts.length ({thoughts.length}) + "
            f"thoughts.lookahead ({thoughts.lookahead}) + 1 is more than the model's "
            f"{longest + block} positions; set data.seq_len to at most {longest}"
        )


def describe(model: QuietStarForCausalLM, config: Config) -> str:
    """One line about what trains."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    name = config.model.name_or_path or f"random {model.causal_lm.config.model_type}"
    return (
        f"{name}: {total / 1e6:.1f}M parameters, {trainable / 1e6:.2f}M train "
        f"({config.tuning.method}); {config.thoughts.num_thoughts} thoughts of "
        f"{config.thoughts.length} tokens at every position, lookahead {config.thoughts.lookahead}"
    )
