"""Building what a run needs and checking that it fits together, before the first step."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration, patch_environment, set_seed
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from quietstar.backbone.compiling import check_compile, compile_layers
from quietstar.backbone.devices import keep_freed_memory
from quietstar.backbone.loading import load_base, split_revision, stored_dtypes
from quietstar.backbone.run import num_virtual
from quietstar.config import Config
from quietstar.data import DataReport, EvalData, TrainData, build_data, load_tokenizer
from quietstar.distributed import Strategy, wants_fsdp
from quietstar.distributed.strategies import WEIGHTS_FILE
from quietstar.errors import UserError, reading, visible
from quietstar.judging.critic import load_critic
from quietstar.losses.groups import resolve_chunk_tokens
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.saving import SETTINGS_FILE
from quietstar.model.tuning import quantization
from quietstar.registry import weighted_parts
from quietstar.rewards import reads_records
from quietstar.system.processes import Processes
from quietstar.system.watch import watch
from quietstar.training.agreement import check_agreement
from quietstar.training.run_dir import TRACKERS_FOLDER
from quietstar.training.stages import Stage, plan_stages, scheduled

logger = logging.getLogger(__name__)

HANGS = 6
"""After so many times training.rank_timeout a rank that lives, but comes to no exchange, hangs."""
JUDGED = {"judge", "reward_model"}
"""Rewards that need the section ``judge``."""


@dataclass
class Job:
    """What all stages of a run share; the model is without the strategy's wrapper."""

    stages: Sequence[Stage]
    strategy: Strategy
    tokenizer: PreTrainedTokenizerBase
    model: QuietStarForCausalLM
    data: Sequence[tuple[TrainData, EvalData, DataReport]]


def quiet_libraries() -> None:
    """Leaves the terminal to the run's own progress bar and lines."""
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in `quietstar.cli.main`
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not torch.accelerator.is_available():
        # DeepSpeed, which transformers imports if it is installed, would warn that there is none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def build_accelerator(config: Config) -> Accelerator:
    """Builds the accelerator, on all of the machine's cores where there is no GPU.

    Raises UserError if not all launched processes see each other, or a tracker cannot be used.
    """
    available = {tracker.value for tracker in get_available_trackers()}
    missing = [name for name in config.logging.report_to if name not in available]
    if missing:  # accelerate would leave it out in silence
        known = sorted({tracker.value for tracker in LoggerType} - {"all"})
        remedy = f"pip install {missing[0]}" if missing[0] in known else f"use {', '.join(known)}"
        raise UserError(
            f"logging.report_to: {missing[0]!r} is not available (here are: "
            f"{', '.join(sorted(available)) or 'none'}); {remedy}, or leave it out"
        )
    patience = timedelta(seconds=HANGS * config.training.rank_timeout)
    backend = None
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.cuda.is_available():
        # Without it every rank believes it is alone, and all write the same files.
        backend = "gloo"
    elif wants_fsdp() and torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"  # saving is on CPUs
    use_cpu_threads(config.training.cpu_threads)
    output_dir = Path(config.training.output_dir)
    folders = ProjectConfiguration(str(output_dir), str(output_dir / TRACKERS_FOLDER))
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # our own strategy shards
        accelerator = Accelerator(
            mixed_precision=config.training.mixed_precision,
            log_with=list(config.logging.report_to) or None,
            project_config=folders,
            kwargs_handlers=[InitProcessGroupKwargs(backend, timeout=patience)],
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched but {accelerator.num_processes} see each other; "
            "training would run the same data on each. On CPUs launch with torchrun and "
            "ACCELERATE_USE_CPU=true."
        )
    watch(accelerator.process_index, launched, config.training.rank_timeout)
    return accelerator


def set_up(config: Config, strategy: Strategy, checkpoint: Path | None = None) -> Job:
    """Loads tokenizer, model and data of all stages; raises UserError if one cannot be used.

    Weights of the ``checkpoint`` are loaded later; here it says how many vectors markers have.
    """
    stages, accelerator, seed = plan_stages(config), strategy.accelerator, config.training.seed
    for stage in stages:
        check_batch(stage.config, accelerator.num_processes)
    check_compile(config.training.torch_compile, strategy.sharded)
    set_seed(seed)
    say = partial(print, flush=True) if accelerator.is_main_process else lambda text: None
    tokenizer = find_tokenizer(config)
    # The thread that reads ahead has a tokenizer of its own: Rust's cannot be used by two at once.
    reader = copy.deepcopy(tokenizer)
    data: list[tuple[TrainData, EvalData, DataReport]] = []
    for stage in stages:
        of_stage = f" of stage {stage.name}" if len(stages) > 1 else ""
        say(visible(f"reading the data{of_stage} ({stage.config.data.train})"))
        thoughts = stage.config.thoughts if stage.thinks else None
        # One seed, so that what is held out is held out in every stage.
        whole = stage.thinks and reads_records(stage.config.loss.reward)
        data.append(build_data(stage.config.data, reader, seed, thoughts, whole))
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    check_agreement(config, processes, data)
    say("loading the model")
    settings = next((stage for stage in stages if stage.thinks), stages[0]).config
    model = build_model(settings, tokenizer, strategy)
    if checkpoint is not None:
        _keep_single_markers(model, checkpoint)
    for stage in stages:
        check_thoughts_fit(stage, model)
    device, training = accelerator.device.type, config.training
    model.learn_chunk_tokens = resolve_chunk_tokens(
        training.learn_chunk_tokens, device, strategy.sharded, training.gradient_checkpointing
    )
    model.passes_together = strategy.sharded
    if training.torch_compile:
        compile_layers(model.causal_lm)
    strategy.keep_trainable_only(model)
    for stage in stages:
        thoughts = stage.config.thoughts
        for point in thoughts.schedule if stage.thinks else ():  # each must leave room for an end
            model.configure(scheduled(thoughts, point["step"]))
    named = [stage.config.loss.reward for stage in stages if stage.thinks]
    rewards = {part for name in named for _, part in weighted_parts(name)}
    if rewards >= JUDGED:
        raise UserError(
            "judge.model: cannot be both a judge and a reward model, but the stages of this run "
            "have loss.reward judge and reward_model. Choose one of them."
        )
    may_ask = config.judge.model is not None and any(":" in reward for reward in rewards)
    if rewards & JUDGED or may_ask:
        reward, lookahead = next(iter(rewards & JUDGED), "judge"), settings.thoughts.lookahead
        model.judge = load_critic(config.judge, reward, model, lookahead, accelerator.device)
    return Job(stages, strategy, tokenizer, model, data)


def _keep_single_markers(model: QuietStarForCausalLM, checkpoint: Path) -> None:
    """Gives markers one vector where a checkpoint has one, as earlier versions had for any text."""
    path, counts = checkpoint / WEIGHTS_FILE, list(model.num_markers)
    if not path.is_file():  # of a sharded run
        return
    remedy = "Give another checkpoint."
    with reading(f"--resume ({path})", remedy), safe_open(path, framework="pt") as tensors:
        saved = set(tensors.keys())
        for index, name in enumerate(("start_embedding", "end_embedding")):
            vectors = getattr(model, name)
            if name in saved and len(tensors.get_slice(name).get_shape()) < vectors.ndim:
                setattr(model, name, torch.nn.Parameter(vectors.detach().mean(0)))
                counts[index] = 1
    model.num_markers = (counts[0], counts[1])
    model.configure(model.thoughts)


def check_batch(config: Config, num_processes: int) -> None:
    """Raises UserError if a step has fewer sequences than there are processes."""
    batch_size = config.training.global_batch_size
    if batch_size < num_processes:
        raise UserError(
            f"training.global_batch_size ({batch_size}) must be at least the number of processes "
            f"({num_processes}), so that each has a sequence in every step: set "
            f"training.global_batch_size {num_processes}, or launch {batch_size}"
        )


def use_cpu_threads(threads: int | None) -> None:
    """Uses ``threads``, or this process's part of the cores, where there is no GPU.

    ``accelerate launch`` sets OMP_NUM_THREADS to 1 on its own. Freed memory is kept there.
    """
    if not torch.cuda.is_available():
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(threads or max(1, (cores or 1) // processes))
        keep_freed_memory()


def hub_source(name: str, config: Config) -> tuple[str, dict[str, Any]]:
    """Returns the name of a model without its revision, and the keywords to read its files with."""
    name, revision = split_revision(name)
    return name, {"revision": revision, "trust_remote_code": config.model.trust_remote_code}


def find_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that the config names, or the model's own."""
    key = "tokenizer" if config.model.tokenizer else "name_or_path"
    name, options = hub_source(getattr(config.model, key), config)
    return load_tokenizer(name, what=f"model.{key}", **options)


def build_model(
    config: Config, tokenizer: PreTrainedTokenizerBase, strategy: Strategy | None = None
) -> QuietStarForCausalLM:
    """Loads or builds the base model and turns it into one that thinks.

    A strategy that shards weights loads them lazily.
    """
    unset_hf_deepspeed_config()  # or transformers would shard weights before adapters see them
    settings, dtype = config.model, getattr(torch, config.model.dtype)
    name, hub = settings.name_or_path, {"trust_remote_code": settings.trust_remote_code}
    if name is not None:
        name, hub = hub_source(name, config)
    if name is not None and (Path(name) / SETTINGS_FILE).exists():
        logger.warning(
            "model.name_or_path: %s holds a Quiet-STaR model; only its language model is taken, "
            "the two vectors and the mixing head start anew",
            name,
        )
    load = partial(
        load_base, name, settings.config, vocab_size=len(tokenizer), seed=config.training.seed,
        quantization=quantization(config.tuning), **hub,
    )  # fmt: skip
    if name is None or strategy is None or not strategy.sharded:
        base = load(dtype=dtype)
    else:
        base = load(dtype="stored")
        if stored_dtypes(base) == {base.dtype}:
            strategy.cast_when_sharded(base, dtype)
        else:  # some weights would lose digits on the way
            base = load(dtype=dtype)
    if name is None:
        # Else it would keep the ids that its architecture's first tokenizer had (Llama's end of
        # text is 2), and generation would stop at an ordinary token.
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if key not in (settings.config or {}):
                setattr(base.config, key, getattr(tokenizer, key))
            if base.generation_config is not None:
                setattr(base.generation_config, key, getattr(base.config, key))
    return teach_thinking(base, config, tokenizer)


def teach_thinking(
    base: PreTrainedModel, config: Config, tokenizer: PreTrainedTokenizerBase
) -> QuietStarForCausalLM:
    """Turns a causal LM into one that thinks, as the config says."""
    model = QuietStarForCausalLM.from_base(
        base, tokenizer=tokenizer, thoughts=config.thoughts, mixing_head=config.mixing_head,
        loss=config.loss, tuning=config.tuning,
    )  # fmt: skip
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def check_thoughts_fit(stage: Stage, model: QuietStarForCausalLM) -> None:
    """Raises UserError if texts, thoughts and what follows these exceed the model's positions.

    seq_len, markers, length and lookahead (less one) must be at most the model's positions.
    """
    config, thoughts, longest = stage.config, stage.config.thoughts, model.max_text_length
    if longest is None:
        return
    markers, virtual = sum(model.num_markers), num_virtual(model.causal_lm)
    block = markers + thoughts.length + thoughts.lookahead - 1
    longest += model.block_length - block  # with the thoughts of this stage
    length, loss = config.data.seq_len, config.loss
    limits: list[tuple[str, int, int]] = [("data.seq_len", length, longest)]
    of_teacher = getattr(loss, "teacher_length", None)
    if of_teacher is not None and getattr(loss, "teacher", None) is None:
        limits.append(("loss.teacher_length", of_teacher, longest + thoughts.length - length))
    if stage.thinks and JUDGED & {part for _, part in weighted_parts(loss.reward)}:
        written = config.judge.continuation or thoughts.lookahead
        limits.append(("judge.continuation", written, longest + thoughts.lookahead - length + 1))
    for key, value, most in limits:
        if value > most:
            of_tuning = f", num_virtual_tokens of tuning.options ({virtual})" if virtual else ""
            raise UserError(
                f"{key} ({value}): data.seq_len ({length}), thoughts.length ({thoughts.length}), "
                f"thoughts.lookahead ({thoughts.lookahead}), the tokens of thoughts.start_init and "
                f"end_init ({markers}){of_tuning} and what is written after them have to fit into "
                f"the model's {longest + block + virtual} positions, so it must be at most "
                f"{max(0, most)}. Lower it, or one of the others."
            )


def describe(model: QuietStarForCausalLM, stage: Stage) -> str:
    """Says in one line what trains in a stage, and how."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    total, trainable = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
    config, thoughts = stage.config, stage.config.thoughts
    name = config.model.name_or_path or f"random {model.causal_lm.config.model_type}"
    fraction = f"before {thoughts.position_fraction:.0%} of the tokens"
    if thoughts.position_fraction > 1:
        fraction = f"before up to {thoughts.position_fraction:.0f} tokens of a text"
    most = "up to " if model.may_end_early else ""
    plural = "s" if thoughts.num_thoughts != 1 else ""
    what = f"{thoughts.num_thoughts} thought{plural} of {most}{thoughts.length} tokens "
    what += {
        "all": "at every position",
        "every": f"{fraction}, evenly spaced",
        "random": f"{fraction}, at random",
        "entropy": f"{fraction}, the hardest to predict",
        "top_entropy": f"{fraction}, the hardest to predict among the most likely ones",
        "weight": f"{fraction}, where the mixing head expects most",
        "weighted_entropy": f"{fraction}, hard and with a high expected mixing weight",
        "answer": "before each token of an answer",
        "answer_start": "before each answer",
        "one_random": "before one token of a text, at random",
        "pattern": f"where {thoughts.pattern!r} matches",
        "field": f"where data.positions_field ({config.data.positions_field}) says",
    }[thoughts.positions]
    if thoughts.sampler == "pause":
        what += " (constant pause tokens)"
    objective = f"{what}, lookahead {thoughts.lookahead}" if stage.thinks else "no thoughts"
    if model.objective.student == "plain":
        teacher = getattr(config.loss, "teacher", None)
        objective = f"no thoughts; its teacher's predictions are in {teacher}"
        if teacher is None:
            objective = f"no thoughts; its teacher has {what}"
    return (
        f"{name}: {total / 1e6:.1f}M parameters, {trainable / 1e6:.2f}M train "
        f"({config.tuning.method}); {objective}"
    )


def notices(stage: Stage, eval_data: EvalData) -> list[str]:
    """Says what should be known of how a stage learns, a line each."""
    if not stage.thinks:
        return []
    thoughts, lines = stage.config.thoughts, []
    if thoughts.schedule and thoughts.schedule[0]["step"] > stage.config.training.max_steps:
        lines.append(
            f"notice: thoughts.schedule: begins at step {thoughts.schedule[0]['step']}, after the "
            f"{stage.config.training.max_steps} of the stage"
        )
    filters = {"top_p": thoughts.top_p if thoughts.top_p != 1 else None, "top_k": thoughts.top_k}
    given = [f"thoughts.{key} ({x})" for key, x in filters.items() if x is not None]
    if given and thoughts.sampler != "pause":
        lines.append(
            f"notice: {' and '.join(given)}: thought tokens are drawn from a truncated "
            "distribution, but the policy term scores them by the full one, which biases its "
            "gradient"
        )
    lengths = [len(sample.rationale) for sample in eval_data.samples if len(sample.rationale)]
    if lengths and min(lengths) > thoughts.length:
        lines.append(
            f"notice: thoughts.length ({thoughts.length}): shorter than the steps to an answer, "
            f"which take {min(lengths)} to {max(lengths)} tokens in the held-out texts of "
            f"data.train ({stage.config.data.train}), so no thought can hold them"
        )
    return lines
