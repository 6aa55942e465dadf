"""Building what a run needs and checking that it fits together, before the first step."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration, patch_environment
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from quietstar.backbone.loading import load_base, stored_dtypes
from quietstar.backbone.run import num_virtual
from quietstar.config import Config
from quietstar.data import EvalData, load_tokenizer
from quietstar.distributed import Strategy, wants_fsdp
from quietstar.errors import UserError
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.saving import SETTINGS_FILE
from quietstar.model.tuning import quantization
from quietstar.training.checkpoint import TRACKERS_FOLDER
from quietstar.training.stages import Stage

logger = logging.getLogger(__name__)


def quiet_libraries() -> None:
    """Leaves the terminal to the run's own progress bar and lines."""
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in `quietstar.cli.main`
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def build_accelerator(config: Config) -> Accelerator:
    """Builds the accelerator, on all of the machine's cores where there is no GPU.

    Raises:
        UserError: Fewer processes than launched see each other, or a tracker cannot be used.
    """
    handlers = []
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.cuda.is_available():
        # Without it every rank believes it is alone, and all write the same files.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    elif wants_fsdp() and torch.cuda.is_available():
        handlers.append(InitProcessGroupKwargs(backend="cpu:gloo,cuda:nccl"))  # saving is on CPUs
    output_dir = Path(config.training.output_dir)
    use_cpu_threads(config.training.cpu_threads)
    check_trackers(config.logging.report_to)
    folders = ProjectConfiguration(
        project_dir=str(output_dir), logging_dir=str(output_dir / TRACKERS_FOLDER)
    )
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # our own strategy shards
        accelerator = Accelerator(
            mixed_precision=config.training.mixed_precision,
            log_with=list(config.logging.report_to) or None,
            project_config=folders,
            kwargs_handlers=handlers,
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched but {accelerator.num_processes} see each other; "
            "training would run the same data on each. On CPUs launch with torchrun and "
            "ACCELERATE_USE_CPU=true."
        )
    return accelerator


def check_batch(config: Config, num_processes: int) -> None:
    """Refuses a step that leaves a process without work.

    Raises:
        UserError: The step has fewer sequences than there are processes.
    """
    batch_size = config.training.global_batch_size
    if batch_size < num_processes:
        raise UserError(
            f"training.global_batch_size ({batch_size}) must be at least the number of processes "
            f"({num_processes}), so that each has a sequence in every step: set "
            f"training.global_batch_size {num_processes}, or launch {batch_size}"
        )


def use_cpu_threads(threads: int | None) -> None:
    """Uses the machine's cores where there is no GPU, and keeps freed memory there.

    ``accelerate launch`` sets OMP_NUM_THREADS to 1 on its own.

    Args:
        threads: Number of threads; by default this process's part of the cores.
    """
    if not torch.cuda.is_available():
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(threads or max(1, (cores or 1) // processes))
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Lets glibc keep large freed blocks for the next ones; returns True if it does.

    By default it gives blocks of megabytes back at once, and gets them again page by page: on two
    cores 11 % of a training step (docs/performance.md). A ``MALLOC_`` variable in the environment
    takes precedence.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def check_trackers(names: Sequence[str]) -> None:
    """Refuses a tracker that accelerate would leave out in silence.

    Raises:
        UserError: It is unknown to accelerate, or its package is not installed.
    """
    available = {tracker.value for tracker in get_available_trackers()}
    missing = [name for name in names if name not in available]
    if missing:
        known = sorted({tracker.value for tracker in LoggerType} - {"all"})
        remedy = f"pip install {missing[0]}" if missing[0] in known else f"use {', '.join(known)}"
        raise UserError(
            f"logging.report_to: {missing[0]!r} is not available (here are: "
            f"{', '.join(sorted(available)) or 'none'}); {remedy}, or leave it out"
        )


def find_tokenizer(config: Config, hub: dict) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that the config names, or the model's own."""
    name = config.model.tokenizer or config.model.name_or_path
    assert name is not None, "the config was validated"
    return load_tokenizer(name, **hub)


def build_model(
    config: Config, tokenizer: PreTrainedTokenizerBase, hub: dict, strategy: Strategy | None = None
) -> QuietStarForCausalLM:
    """Loads or builds the base model and turns it into one that thinks.

    Args:
        config: The run's config.
        tokenizer: The model's tokenizer.
        hub: Keywords for the hub: ``revision``, ``trust_remote_code``.
        strategy: Strategy that will train the model; one that shards weights loads them lazily.
    """
    unset_hf_deepspeed_config()  # or transformers would shard weights before adapters see them
    settings, dtype = config.model, getattr(torch, config.model.dtype)
    name = settings.name_or_path
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
    if name is None:
        base = load(dtype=dtype)
        adopt_special_tokens(base, tokenizer, settings.config or {})
        return teach_thinking(base, config, tokenizer)
    if strategy is None or not strategy.sharded:
        return teach_thinking(load(dtype=dtype), config, tokenizer)
    base = load(dtype="stored")
    if stored_dtypes(base) != {base.dtype}:  # some weights would lose digits on the way
        return teach_thinking(load(dtype=dtype), config, tokenizer)
    strategy.cast_when_sharded(base, dtype)
    return teach_thinking(base, config, tokenizer)


def adopt_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]
) -> None:
    """Gives a new model its tokenizer's special tokens, where ``fields`` does not name them.

    Otherwise it would keep the ids that its architecture's first tokenizer had (Llama's end of text
    is 2), and generation would stop at an ordinary token.
    """
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key not in fields:
            setattr(model.config, key, getattr(tokenizer, key))
        if model.generation_config is not None:
            setattr(model.generation_config, key, getattr(model.config, key))


def teach_thinking(
    base: PreTrainedModel, config: Config, tokenizer: PreTrainedTokenizerBase
) -> QuietStarForCausalLM:
    """Turns a causal LM into one that thinks, as the config says."""
    model = QuietStarForCausalLM.from_base(
        base,
        tokenizer=tokenizer,
        thoughts=config.thoughts,
        mixing_head=config.mixing_head,
        loss=config.loss,
        tuning=config.tuning,
    )
    if config.training.gradient_checkpointing:
        checkpoint_activations(model.causal_lm)
    return model


def check_thoughts_fit(stage: Stage, model: QuietStarForCausalLM, eval_data: EvalData) -> None:
    """Refuses sequences without room for a thought, and thoughts without room for a rationale.

    Raises:
        UserError: seq_len + length + lookahead + 1 is more than the model's positions, or a stage
            thinks in fewer tokens than the shortest rationale has.
    """
    config, thoughts, longest = stage.config, stage.config.thoughts, model.max_text_length
    if longest is not None and config.data.seq_len > longest:
        block = thoughts.length + thoughts.lookahead + 1
        virtual = num_virtual(model.causal_lm)
        with_virtual = f" + tuning.num_virtual_tokens ({virtual})" if virtual else ""
        remedy = f"set data.seq_len to at most {longest}"
        if longest < 2:
            remedy = "lower tuning.num_virtual_tokens" if virtual else "shorten the thoughts"
        raise UserError(
            f"data.seq_len ({config.data.seq_len}) + thoughts.length ({thoughts.length}) + "
            f"thoughts.lookahead ({thoughts.lookahead}) + 1{with_virtual} is more than the model's "
            f"{longest + block + virtual} positions; {remedy}"
        )
    lengths = [len(sample.rationale) for sample in eval_data.samples if len(sample.rationale)]
    if stage.thinks and lengths and min(lengths) > thoughts.length:
        raise UserError(
            f"thoughts.length ({thoughts.length}) must be at least {min(lengths)}, the fewest "
            "tokens of the steps to an answer in the held-out texts of data.train "
            f"({config.data.train}; at most {max(lengths)}): a shorter thought cannot hold them. "
            "Raise it, or make data.task_options easier."
        )


def describe(model: QuietStarForCausalLM, stage: Stage) -> str:
    """Says in one line what trains in a stage, and how."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    total, trainable = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
    config, thoughts = stage.config, stage.config.thoughts
    name = config.model.name_or_path or f"random {model.causal_lm.config.model_type}"
    fraction = f"before {thoughts.position_fraction:.0%} of the tokens"
    where = {
        "all": "at every position",
        "every": f"{fraction}, evenly spaced",
        "random": f"{fraction}, at random",
        "entropy": f"{fraction}, the hardest to predict",
        "weight": f"{fraction}, where the mixing head expects most",
        "weighted_entropy": f"{fraction}, hard and with a high expected mixing weight",
        "answer": "before each token of an answer",
        "answer_start": "before each answer",
    }[thoughts.positions]
    what = f"{thoughts.num_thoughts} thoughts of {thoughts.length} tokens {where}"
    if thoughts.sampler == "pause":
        what += " (constant pause tokens)"
    objective = f"{what}, lookahead {thoughts.lookahead}" if stage.thinks else "no thoughts"
    return (
        f"{name}: {total / 1e6:.1f}M parameters, {trainable / 1e6:.2f}M train "
        f"({config.tuning.method}); {objective}"
    )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes a model recompute its activations in the backward pass."""
    with warnings.catch_warnings():  # its new name is not known to the oldest transformers
        warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")
        model.gradient_checkpointing_enable({"use_reentrant": False})
