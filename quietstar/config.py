"""The config of a training run: one frozen, typed tree.

Each field has its bounds and one sentence; ``quietstar train --help`` prints both. Rules that tie
fields together are in `cross_field_problems`. Unknown keys are errors, and so is a value of another
type (the text ``"8"`` is no integer). `quietstar.config_io` reads and writes the tree as YAML.

This module imports no torch, so that a wrong config is reported at once.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """What all parts of the tree share: frozen, strict types, no unknown keys, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The base model: pretrained (`name_or_path`) or with random weights (`config`)."""

    name_or_path: str | None = Field(
        default=None,
        min_length=1,
        description="Hub id or folder of the pretrained model (or set model.config instead).",
    )
    config: dict[str, Any] | None = Field(
        default=None,
        description="Inline architecture, model_type plus fields of its transformers config, for a"
        " model with random weights.",
    )
    tokenizer: str | None = Field(
        default=None,
        min_length=1,
        description="Folder or hub id of the tokenizer, or `bytes` for the built-in byte-level one;"
        " null means the model's own, and model.config needs one.",
    )
    revision: str | None = Field(
        default=None, min_length=1, description="Branch, tag or commit of a model from the hub."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run model code that comes with the model from the hub."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Type of the weights held in memory; training.precision is that of the"
        " arithmetic.",
    )


class TuningConfig(Section):
    """Which weights of the base model train."""

    method: Literal["full", "lora"] = Field(
        default="full",
        description="Train all weights of the base model, or low-rank adapters beside frozen ones"
        " (the mixing head and the two embeddings train either way).",
    )
    lora_rank: int = Field(default=16, ge=1, description="Rank of the adapters.")
    lora_alpha: float = Field(
        default=32.0, gt=0, description="Scale of the adapters, whose output is times alpha / rank."
    )
    lora_targets: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Names of the layers that get adapters; null means all linear layers of the"
        " decoder.",
    )


class ThoughtsConfig(Section):
    """The thoughts: how long, how many, and how they are sampled."""

    length: int = Field(
        default=8, ge=1, description="Free tokens of a thought; its start and end are not counted."
    )
    lookahead: int = Field(
        default=4, ge=1, description="True tokens after the position that a thought is scored on."
    )
    num_thoughts: int = Field(default=2, ge=1, description="Thoughts sampled at each position.")
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="Temperature at which thought tokens are sampled in training.",
    )
    start_init: str = Field(
        default="---",
        min_length=1,
        description="Text whose input embedding initialises the learned start embedding.",
    )
    end_init: str = Field(
        default="---",
        min_length=1,
        description="Text whose input embedding initialises the learned end embedding.",
    )


class MixingHeadConfig(Section):
    """The mixing head: how far the thought's prediction replaces the base's."""

    activation: Literal["sigmoid", "none"] = Field(
        default="sigmoid",
        description="Last layer of the head: sigmoid keeps the mixing weight in (0, 1); none is the"
        " paper's unbounded head.",
    )
    initial_weight: float = Field(
        default=0.12,
        ge=0,
        lt=1,
        description="Mixing weight at the start of training, above 0 with sigmoid and 0 with"
        " activation none.",
    )
    hidden_size: int | None = Field(
        default=None,
        ge=1,
        description="Width of the head's hidden layers; null means the model's width.",
    )
    floor: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Lower bound of the mixing weight, so that it cannot collapse to 0 while"
        " thoughts are still useless (part of the saved head).",
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="First steps in which warmup_weight stands in for the head's output.",
    )
    warmup_weight: float = Field(
        default=0.5, ge=0, le=1, description="Fixed mixing weight during warmup_steps."
    )


class LossConfig(Section):
    """The terms of the loss, and the estimator of the policy gradient."""

    base_weight: float = Field(
        default=0.3,
        ge=0,
        description="Weight of the NLL of the base prediction (without a thought).",
    )
    mixed_weight: float = Field(
        default=0.3, ge=0, description="Weight of the NLL of the mixed prediction."
    )
    thought_weight: float = Field(
        default=0.4,
        ge=0,
        description="Weight of the NLL of the thought's own prediction, which teaches the model to"
        " go on after a thought.",
    )
    draft_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the NLL of the next true token as the first thought token: thoughts"
        " begin as drafts of what follows, which gives REINFORCE something to improve.",
    )
    policy_weight: float = Field(
        default=0.1, ge=0, description="Weight of the REINFORCE term on the thought tokens."
    )
    entropy_weight: float = Field(
        default=0.0, ge=0, description="Weight of a bonus on the entropy of the thought tokens."
    )
    estimator: Literal["leave_one_out", "paper", "no_baseline"] = Field(
        default="leave_one_out",
        description="Policy gradient: leave_one_out is unbiased; paper takes the group mean as"
        " baseline and drops negative advantages; no_baseline uses the reward itself.",
    )
    reward: Literal["mixed", "thought"] = Field(
        default="thought",
        description="Prediction whose log-probability of the true tokens is the reward of a"
        " thought: the mixed one or the thought's own.",
    )
    policy_temperature: float | None = Field(
        default=None,
        gt=0,
        description="Temperature inside the log-probability of the policy term; null means"
        " thoughts.temperature, and 3.0 with estimator paper.",
    )


class DataConfig(Section):
    """The text to train on, and how it is cut into sequences."""

    train: str | None = Field(
        default=None,
        min_length=1,
        description="Training text, required: a .jsonl, .json, .txt or .parquet file, a folder of"
        " them, a hub data set id, or reasoning_gym:<task>.",
    )
    eval: str | None = Field(
        default=None,
        min_length=1,
        description="Held-out text, given like data.train; null holds out a share of data.train.",
    )
    eval_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="Share of data.train held out when data.eval is null."
    )
    eval_sequences: int = Field(
        default=64, ge=1, description="Most sequences that an evaluation reads."
    )
    format: Literal["text", "qa", "chat"] = Field(
        default="text",
        description="Records are raw text, questions with answers (joined by data.template), or"
        " chats (through the tokenizer's chat template).",
    )
    text_field: str = Field(
        default="text", min_length=1, description="Field of a record with the text (format text)."
    )
    question_field: str = Field(
        default="question",
        min_length=1,
        description="Field of a record with the question (format qa).",
    )
    answer_field: str = Field(
        default="answer", min_length=1, description="Field of a record with the answer (format qa)."
    )
    messages_field: str = Field(
        default="messages",
        min_length=1,
        description="Field of a record with the messages (format chat).",
    )
    template: str = Field(
        default="{question}\n{answer}",
        description="Text of a qa record: {question}, then {answer}, then at most white space.",
    )
    spans: Literal["random", "concatenate"] = Field(
        default="random",
        description="One random span of a document per visit, as in the paper, or documents joined"
        " by end-of-text and cut into chunks.",
    )
    loss_on: Literal["all", "answer"] = Field(
        default="all",
        description="Think and learn at all tokens, or only at those of the answer (formats qa and"
        " chat).",
    )
    seq_len: int = Field(default=256, ge=2, description="Tokens of a training sequence.")
    short_texts: Literal["pad", "skip"] = Field(
        default="pad", description="What happens to a text shorter than seq_len."
    )
    split: str = Field(default="train", min_length=1, description="Split of a hub data set.")
    subset: str | None = Field(
        default=None, min_length=1, description="Subset (configuration) of a hub data set."
    )
    streaming: bool = Field(
        default=False,
        description="Read a hub data set while training instead of downloading it first.",
    )
    size: int = Field(
        default=10000, ge=1, description="Generated problems of a reasoning_gym task."
    )
    task_options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the reasoning_gym task."
    )


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(
        default=1e-4, gt=0, description="Learning rate of the base model or its adapters."
    )
    mixing_head_lr: float | None = Field(
        default=None, gt=0, description="Learning rate of the mixing head; null means optim.lr."
    )
    embedding_lr: float | None = Field(
        default=None,
        gt=0,
        description="Learning rate of the start and end embeddings; null means optim.lr.",
    )
    weight_decay: float = Field(default=0.001, ge=0, description="Decoupled weight decay.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean of gradients.")
    beta2: float = Field(
        default=0.999, ge=0, lt=1, description="Decay of the mean of squared gradients."
    )
    eps: float = Field(default=1e-8, gt=0, description="Term in AdamW's denominator.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="Learning rate after the warm-up: constant, or falling to 0 at the last step.",
    )
    warmup_steps: int = Field(
        default=20,
        ge=0,
        description="Steps in which the learning rates rise from 0 to their values.",
    )
    clip_norm: float = Field(
        default=1.0, gt=0, description="Largest norm of the gradient; longer is cut."
    )


class TrainingConfig(Section):
    """The loop: steps, batch, precision, evaluations, checkpoints."""

    steps: int = Field(default=1000, ge=1, description="Optimiser steps.")
    batch_size: int = Field(
        default=8,
        ge=1,
        description="Sequences per optimiser step, over all processes and accumulation.",
    )
    micro_batch_size: int = Field(
        default=1,
        ge=1,
        description="Sequences that one process forwards at once; divides batch_size.",
    )
    precision: Literal["no", "bf16"] = Field(
        default="bf16",
        description="Arithmetic: bfloat16 autocast, or none (the weights' own type).",
    )
    cpu_threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads of each process without a GPU; null shares the cores among the"
        " processes of the machine, where accelerate launch would give each one thread.",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, more time.",
    )
    seed: int = Field(
        default=0, ge=0, description="Seed of data order, sampled thoughts and new weights."
    )
    eval_every: int = Field(
        default=100, ge=0, description="Steps between evaluations; 0 means only at start and end."
    )
    save_every: int = Field(
        default=500, ge=0, description="Steps between checkpoints; 0 means only the final model."
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints kept on disk.")
    output_dir: str = Field(default="runs/default", min_length=1, description="Folder of the run.")
    overwrite: bool = Field(
        default=False,
        description="Start a new run in a folder that already holds one, which is an error"
        " otherwise.",
    )


class LoggingConfig(Section):
    """What is reported, where and how often."""

    trackers: list[str] = Field(
        default_factory=lambda: ["tensorboard"],
        description="Trackers of accelerate (tensorboard, wandb, ...) that get the metrics beside"
        " metrics.jsonl.",
    )
    log_every: int = Field(default=1, ge=1, description="Steps between two records of the metrics.")
    thought_every: int = Field(
        default=25,
        ge=0,
        description="Steps between two decoded thoughts on the terminal; 0 means none.",
    )


class Config(Section):
    """The whole tree.

    Raises:
        pydantic.ValidationError: With every broken bound, or else every broken cross-field rule.
    """

    model: ModelConfig = Field(default_factory=ModelConfig, description="The base model.")
    tuning: TuningConfig = Field(
        default_factory=TuningConfig, description="Which weights of the base model train."
    )
    thoughts: ThoughtsConfig = Field(
        default_factory=ThoughtsConfig, description="How long, how many, and how sampled."
    )
    mixing_head: MixingHeadConfig = Field(
        default_factory=MixingHeadConfig,
        description="How far the thought's prediction replaces the base's.",
    )
    loss: LossConfig = Field(
        default_factory=LossConfig, description="Terms of the loss, and the policy gradient."
    )
    data: DataConfig = Field(
        default_factory=DataConfig, description="The text, and how it is cut into sequences."
    )
    optim: OptimConfig = Field(default_factory=OptimConfig, description="AdamW and its schedule.")
    training: TrainingConfig = Field(
        default_factory=TrainingConfig, description="Steps, batch, precision, checkpoints."
    )
    logging: LoggingConfig = Field(
        default_factory=LoggingConfig, description="What is reported, where and how often."
    )

    @model_validator(mode="after")
    def _check_cross_field_rules(self) -> "Config":
        problems = cross_field_problems(self)
        if problems:
            lines = "\n".join(f"{problem.keys[0]}: {problem.message}" for problem in problems)
            context = {"lines": lines, "problems": problems}
            raise PydanticCustomError(CROSS_FIELD_ERROR, "{lines}", context)
        return self


CROSS_FIELD_ERROR = "cross_field"  # type of the pydantic error that carries the problems


class CrossFieldProblem(NamedTuple):
    """A broken rule between fields.

    Attributes:
        keys: Dotted names of the fields in the rule, the one to change first.
        message: The values, the rule, the reason and the remedy in one line.
    """

    keys: tuple[str, ...]
    message: str


def cross_field_problems(config: Config) -> list[CrossFieldProblem]:
    """All broken rules between the fields of a config whose single fields are valid."""
    rules = (_model_rules, _thought_rules, _mixing_head_rules, _loss_rules, _data_rules)
    problems = [problem for rule in rules for problem in rule(config)]
    return [*problems, *_batch_rules(config)]


def _model_rules(config: Config) -> Iterator[CrossFieldProblem]:
    model = config.model
    if (model.name_or_path is None) == (model.config is None):
        state = "neither model.name_or_path nor model.config is set"
        remedy = "Set model.name_or_path to a folder or hub id"
        if model.config is not None:
            state = f"both model.name_or_path ({model.name_or_path}) and model.config are set"
            remedy = "Set model.config: null to train the pretrained model"
        yield CrossFieldProblem(
            ("model.name_or_path", "model.config"),
            f"{state}, but exactly one must be: the weights are pretrained or random. {remedy}.",
        )
    if model.config is None:
        return
    if config.tuning.method == "lora":
        yield CrossFieldProblem(
            ("tuning.method", "model.config"),
            "tuning.method: lora needs a pretrained model, but model.config makes random weights,"
            " which a saved adapter could not name. Set tuning.method: full.",
        )
    if not isinstance(model.config.get("model_type"), str):
        yield CrossFieldProblem(
            ("model.config",),
            f"names no model_type (keys: {', '.join(model.config) or 'none'}), but it must: the"
            " other keys are fields of an architecture. Add model_type, such as model_type: llama.",
        )
    if model.name_or_path is None and model.tokenizer is None:
        yield CrossFieldProblem(
            ("model.tokenizer", "model.config"),
            "null with model.config must be set: random weights come with no tokenizer."
            " Set model.tokenizer: bytes, or a folder or hub id.",
        )


def _thought_rules(config: Config) -> Iterator[CrossFieldProblem]:
    thoughts, loss = config.thoughts, config.loss
    grouped = loss.estimator != "no_baseline" and loss.policy_weight > 0
    if thoughts.num_thoughts == 1 and grouped:
        yield CrossFieldProblem(
            ("thoughts.num_thoughts", "loss.estimator", "loss.policy_weight"),
            "thoughts.num_thoughts (1) must be at least 2: the REINFORCE baseline compares thoughts"
            " sampled at the same position. Raise it, or set loss.estimator: no_baseline.",
        )
    if thoughts.lookahead >= config.data.seq_len:
        yield CrossFieldProblem(
            ("thoughts.lookahead", "data.seq_len"),
            f"thoughts.lookahead ({thoughts.lookahead}) must be smaller than data.seq_len"
            f" ({config.data.seq_len}): the true tokens that a thought is scored on lie in the same"
            " sequence. Lower it, or raise data.seq_len.",
        )


def _mixing_head_rules(config: Config) -> Iterator[CrossFieldProblem]:
    head = config.mixing_head
    if head.activation == "sigmoid":
        if head.initial_weight == 0:
            yield CrossFieldProblem(
                ("mixing_head.initial_weight", "mixing_head.activation"),
                "mixing_head.initial_weight (0) must be above 0 with mixing_head.activation:"
                " sigmoid, which never reaches 0. Set a small value such as 0.12, or"
                " mixing_head.activation: none.",
            )
        elif head.initial_weight <= head.floor:
            yield CrossFieldProblem(
                ("mixing_head.initial_weight", "mixing_head.floor"),
                f"mixing_head.initial_weight ({head.initial_weight}) must be above"
                f" mixing_head.floor ({head.floor}), the lower bound of the weight. Raise it, or"
                " lower the floor.",
            )
        return
    if head.initial_weight != 0:
        yield CrossFieldProblem(
            ("mixing_head.initial_weight", "mixing_head.activation"),
            f"mixing_head.initial_weight ({head.initial_weight}) must be 0 with"
            " mixing_head.activation: none, the paper's head, which is zero at the start."
            " Set it to 0, or mixing_head.activation: sigmoid.",
        )
    if head.floor != 0:
        yield CrossFieldProblem(
            ("mixing_head.floor", "mixing_head.activation"),
            f"mixing_head.floor ({head.floor}) must be 0 with mixing_head.activation: none, whose"
            " output has no bounds. Set it to 0, or mixing_head.activation: sigmoid.",
        )


def _loss_rules(config: Config) -> Iterator[CrossFieldProblem]:
    weights = {
        f"loss.{name}": value
        for name, value in config.loss.model_dump().items()
        if name.endswith("_weight")
    }
    keys = tuple(weights)
    if not any(weights.values()):
        yield CrossFieldProblem(
            keys,
            f"all weights ({', '.join(keys)}) are 0, but at least one must be above 0: there would"
            " be nothing to learn. Leave one of them out to get its default.",
        )


def _data_rules(config: Config) -> Iterator[CrossFieldProblem]:
    data = config.data
    if data.train is None:
        yield CrossFieldProblem(
            ("data.train",),
            "data.train is not set, but it must name the text to train on. Pass --data.train with a"
            " .jsonl, .json, .txt or .parquet file, a folder, a hub data set id, or"
            " reasoning_gym:<task>.",
        )
    before, placeholder, after = data.template.rpartition("{answer}")
    if not placeholder or after.strip() or "{answer}" in before or "{question}" not in before:
        yield CrossFieldProblem(
            ("data.template",),
            f"data.template ({data.template!r}) must hold {{question}}, then {{answer}} once, then"
            " at most white space: the answer is what follows the question."
            " Write it like '{question} {answer}'.",
        )
    if data.loss_on == "answer" and data.format == "text":
        yield CrossFieldProblem(
            ("data.loss_on", "data.format"),
            "data.loss_on (answer) must be all with data.format: text, which does not tell an"
            " answer from its question. Set it to all, or data.format to qa or chat.",
        )


def _batch_rules(config: Config) -> Iterator[CrossFieldProblem]:
    training = config.training
    if training.batch_size % training.micro_batch_size:
        yield CrossFieldProblem(
            ("training.micro_batch_size", "training.batch_size"),
            f"training.micro_batch_size ({training.micro_batch_size}) must divide"
            f" training.batch_size ({training.batch_size}): a step is made of whole micro-batches."
            " Set it to a divisor, such as 1.",
        )
