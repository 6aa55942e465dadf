"""Settings that change nothing beside the others, which a user who set them should know."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from quietstar import registry
from quietstar.config.schema import GYM, SYNTHETIC
from quietstar.config.tree import Config, keys_of, loss_class

_LORA = ("lora", "rslora", "dora", "qlora")
_METHODS = {
    "tuning.lora_r": _LORA,
    "tuning.lora_alpha": _LORA,
    "tuning.lora_target_modules": (*_LORA, "ia3"),
}
"""Methods that read a key."""
_FORMATS = {
    "data.text_field": "text",
    "data.question_field": "qa",
    "data.answer_field": "qa",
    "data.template": "qa",
}
"""Format of records that reads a key."""
_OF_THOUGHTS = (
    *("thoughts.num_thoughts", "thoughts.temperature", "thoughts.top_p", "thoughts.top_k"),
    *("thoughts.schedule", "loss.reward", "logging.thought_steps", "training.eval_controls"),
    *("mixing_head.warmup_steps", "mixing_head.warmup_weight", "data.rationale_field"),
    "data.positions_field",
    *("optim.mixing_head_learning_rate", "optim.embedding_learning_rate"),
    "training.inner_epochs",
)
"""Keys that only a stage that thinks reads; what is saved with a model is not among them."""
_OF_A_JUDGE = ("mode", "template", "rationale")
"""Keys of the section judge that a reward model does not read."""
_OF_THE_HEAD = (
    "mixing_head.initial_weight",
    "mixing_head.floor",
    "optim.mixing_head_learning_rate",
)
"""Keys that change nothing where the head's output is not read."""


def keys_without_effect(config: Config) -> dict[str, str]:
    """Returns the keys whose values change nothing in a stage, each with the reason."""
    rules = (_tuning, _thoughts, _judge, _sources, _records, _loop)
    return {key: reason for rule in rules for key, reason in rule(config)}


Idle = Iterator[tuple[str, str]]


def _tuning(config: Config) -> Idle:
    method = config.tuning.method
    for key, methods in _METHODS.items():
        if method not in methods:
            yield key, f"with tuning.method: {method}"
    if method in ("full", "galore"):
        yield "tuning.unfreeze", f"with tuning.method: {method}, which trains all weights"


def _thoughts(config: Config) -> Idle:
    loss, thoughts = config.loss, config.thoughts
    if not loss.thinks:
        for key in _OF_THOUGHTS:
            yield key, f"with loss.objective: {loss.objective}, which does not think"
    known = loss_class(loss.objective).model_fields
    for key in keys_of("loss"):
        if key.partition(".")[2] not in known:
            yield key, f"with loss.objective: {loss.objective}"
    yield from registry.find("loss.objective", loss.objective).unused(loss)
    rule = f"with thoughts.positions: {thoughts.positions}"
    if thoughts.positions in ("all", "one_random", "answer", "answer_start", "pattern", "field"):
        yield "thoughts.position_fraction", rule
    if thoughts.positions != "pattern":
        yield "thoughts.pattern", rule
    if thoughts.positions != "field":
        yield "data.positions_field", rule
    if thoughts.sampler == "pause":
        yield "thoughts.stop", "with thoughts.sampler: pause, whose thoughts have all their tokens"
        for key in ("thoughts.top_p", "thoughts.top_k"):
            yield key, "with thoughts.sampler: pause, which draws nothing"
    if config.mixing_head.fixed_weight is not None:
        for key in _OF_THE_HEAD:
            yield key, "with mixing_head.fixed_weight, which stands in for what the head says"
    if config.mixing_head.warmup_steps == 0:
        yield "mixing_head.warmup_weight", "with mixing_head.warmup_steps: 0"


def _judge(config: Config) -> Idle:
    reward = config.loss.reward
    for key in keys_of("judge"):
        name = key.partition(".")[2]
        if not config.loss.thinks:
            yield key, f"with loss.objective: {config.loss.objective}, which does not think"
        elif reward == "reward_model" and name in _OF_A_JUDGE:
            yield key, "with loss.reward: reward_model"
        elif reward not in ("judge", "reward_model") and ":" not in reward:
            yield key, f"with loss.reward: {reward}, which asks no judge"


def _sources(config: Config) -> Idle:
    data = config.data
    named = [name for name in (data.train, data.eval) if name is not None]
    generated = [name for name in named if name.startswith((GYM, SYNTHETIC))]
    others = [name for name in named if name not in generated]
    if not generated:
        yield "data.task_options", "without a reasoning_gym or synthetic task"
    if not others:
        for key in ("text_field", "question_field", "answer_field"):
            yield f"data.{key}", "with generated problems, whose fields are known"
    if data.eval is not None:
        yield "data.eval_fraction", "with data.eval"
    elif data.streaming:
        yield "data.eval_fraction", "with data.streaming, which holds out data.eval_sequences"
    elif (data.train or "").startswith(SYNTHETIC):
        yield "data.eval_fraction", "with a synthetic task, which has held-out problems of its own"


def is_on_hub(name: str) -> bool:
    """Tell whether a name can be that of something on the hub."""
    is_local = name.startswith((".", "/", SYNTHETIC)) or os.path.exists(name)
    return not is_local and Path(name).suffix not in (".jsonl", ".json", ".txt", ".parquet")


def _records(config: Config) -> Idle:
    for key, form in _FORMATS.items():
        if config.data.format != form:
            yield key, f"with data.format: {config.data.format}"


def _loop(config: Config) -> Idle:
    training, cores = config.training, os.cpu_count()
    if training.inner_epochs == 1 and ":" not in config.thoughts.sampler:
        for key in ("loss.clip_low", "loss.clip_high"):
            yield key, "with training.inner_epochs: 1, where thoughts are of the model as it is"
    if training.save_steps == 0:
        yield "training.save_total_limit", "with training.save_steps: 0"
    last = f"beyond the end of the run at training.max_steps ({training.max_steps})"
    if config.optim.warmup_steps >= training.max_steps:
        yield "optim.warmup_steps", f"{last}: the learning rates never reach their values"
    if config.mixing_head.warmup_steps >= training.max_steps:
        yield "mixing_head.warmup_steps", f"{last}: the mixing head never learns"
    if cores is not None and (training.cpu_threads or 0) > cores:
        yield "training.cpu_threads", f"above {cores}, the cores of this machine"
