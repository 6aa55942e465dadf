"""The sections of the config: every key with its type, bounds and a sentence."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


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
        description="Folder or hub id of the tokenizer, `bytes` for the built-in byte-level one, or"
        " `synthetic:<task>` for that task's words; null means the model's own, and model.config"
        " needs one.",
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

    method: Literal[
        "full",
        "lora",
        "rslora",
        "dora",
        "qlora",
        "ia3",
        "houlsby",
        "mlp_adapter",
        "prompt",
        "prefix",
        "galore",
    ] = Field(
        default="full",
        description="Train all weights of the base model, or something small beside frozen ones:"
        " low-rank adapters (plain, rank-stabilised, with magnitudes, on 4-bit weights), scales"
        " (ia3), bottleneck adapters (after attention and MLP, or MLP only), virtual tokens"
        " (prompt: their embeddings; prefix: their keys and values in every layer); galore: all"
        " weights by low-rank gradients. The mixing head and the two embeddings always train.",
    )
    lora_rank: int = Field(default=16, ge=1, description="Rank of the adapters.")
    lora_alpha: float = Field(
        default=32.0, gt=0, description="Scale of the adapters, whose output is times alpha / rank."
    )
    lora_targets: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Names of the layers that get adapters; null means all linear layers of the"
        " decoder (ia3: keys, values and the MLP's output).",
    )
    adapter_size: int = Field(
        default=64, ge=1, description="Width of bottleneck adapters (houlsby, mlp_adapter)."
    )
    virtual_tokens: int = Field(
        default=16, ge=1, description="Virtual tokens before every text (prompt, prefix)."
    )
    galore_rank: int = Field(default=128, ge=1, description="Rank of the gradients (galore).")
    galore_update_every: int = Field(
        default=200, ge=1, description="Steps between two choices of the subspace (galore)."
    )
    galore_scale: float = Field(default=0.25, gt=0, description="Scale of the update (galore).")
    unfreeze: list[str] = Field(
        default_factory=list,
        description="Parameters of the base model that train beside what the method adds, by the"
        " end of their names; * stands for anything: layers.29.*, embed_tokens.weight.",
    )


class ThoughtsConfig(Section):
    """The thoughts: how long, how many, and how they are sampled."""

    source: Literal["sampled", "pause"] = Field(
        default="sampled",
        description="Thoughts that the model samples, or a constant token in their place, the first"
        " of thoughts.start_init: a control that thinks nothing.",
    )
    positions: Literal[
        "all", "every", "random", "entropy", "weight", "weighted_entropy", "answer", "answer_start"
    ] = Field(
        default="all",
        description="Where the text thinks: before all tokens; before evenly spaced, random, or the"
        " hardest to predict ones, or those where the mixing head expects most of a thought, or by"
        " the product of both (thoughts.share of them); or before the tokens of an answer, or the"
        " first of them.",
    )
    share: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="Share of the targets that get a thought, unless before all or answers; every"
        " n-th is a share of 1/n.",
    )
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
        " them, a hub data set id, reasoning_gym:<task>, or synthetic:<task>.",
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
    steps_field: str | None = Field(
        default=None,
        min_length=1,
        description="Field of a record with the steps to its answer (format qa), to tell right"
        " thoughts from others in evaluations; never trained on.",
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
    min_context: int = Field(
        default=1,
        ge=1,
        description="First tokens of a sequence that are no targets. From its very first token a"
        " pretrained model predicts badly (it serves as attention sink), and any thought mends"
        " that; a few more keep this out of the gain.",
    )
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
        default=10000, ge=1, description="Generated problems of a reasoning_gym or synthetic task."
    )
    task_options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the reasoning_gym or synthetic task."
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

    objective: Literal["quiet_star", "next_token"] = Field(
        default="quiet_star",
        description="Learn to think, or plain language modelling without thoughts.",
    )
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
    block_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        default="auto",
        description="Most tokens of thoughts that learn at once, forward and backward, before the"
        " next ones: less is less memory, at no cost until matrix products get small. null: all at"
        " once. auto: 5120 (4096 with activation checkpointing), on a GPU 16384; null under ZeRO-3"
        " and FSDP2, which cannot.",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, more time.",
    )
    compile: bool = Field(
        default=False,
        description="torch.compile of the decoder layers: shorter steps after half a minute or so"
        " of compiling. Needs a C++ compiler; not under ZeRO-3 and FSDP2.",
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
