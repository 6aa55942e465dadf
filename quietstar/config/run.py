"""Sections that say what a run reads, how it steps and what it leaves: keys, types, bounds."""

from typing import Annotated, Any, Literal

from pydantic import Field

from quietstar.config.section import Section


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
    rationale_field: str | None = Field(
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

    learning_rate: float = Field(
        default=1e-4, gt=0, description="Learning rate of the base model or its adapters."
    )
    mixing_head_learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Learning rate of the mixing head; null means optim.learning_rate.",
    )
    embedding_learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Learning rate of the start and end embeddings; null means"
        " optim.learning_rate.",
    )
    weight_decay: float = Field(default=0.001, ge=0, description="Decoupled weight decay.")
    adam_beta1: float = Field(
        default=0.9, ge=0, lt=1, description="Decay of the mean of gradients."
    )
    adam_beta2: float = Field(
        default=0.999, ge=0, lt=1, description="Decay of the mean of squared gradients."
    )
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Term in AdamW's denominator.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="Learning rate after the warm-up: constant, or falling to 0 at the last step.",
    )
    warmup_steps: int = Field(
        default=20,
        ge=0,
        description="Steps in which the learning rates rise from 0 to their values.",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Largest norm of the gradient; longer is cut."
    )


class TrainingConfig(Section):
    """The loop: steps, batch, precision, evaluations, checkpoints."""

    max_steps: int = Field(default=1000, ge=1, description="Optimiser steps.")
    global_batch_size: int = Field(
        default=8,
        ge=1,
        description="Sequences per optimiser step, over all processes and accumulation.",
    )
    micro_batch_size: int = Field(
        default=1,
        ge=1,
        description="Sequences that one process forwards at once; divides batch_size.",
    )
    mixed_precision: Literal["no", "bf16"] = Field(
        default="bf16",
        description="Arithmetic: bfloat16 autocast, or none (the weights' own type).",
    )
    cpu_threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads of each process without a GPU; null shares the cores among the"
        " processes of the machine, where accelerate launch would give each one thread.",
    )
    learn_chunk_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        default="auto",
        description="Most tokens of thoughts that learn at once, forward and backward, before the"
        " next ones: less is less memory, at no cost until matrix products get small. null: all at"
        " once. auto: 5120 (4096 with activation checkpointing), on a GPU 16384; null under ZeRO-3"
        " and FSDP2, which cannot.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, more time.",
    )
    torch_compile: bool = Field(
        default=False,
        description="torch.compile of the decoder layers: shorter steps after half a minute or so"
        " of compiling. Needs a C++ compiler; not under ZeRO-3 and FSDP2.",
    )
    seed: int = Field(
        default=0, ge=0, description="Seed of data order, sampled thoughts and new weights."
    )
    eval_steps: int = Field(
        default=100, ge=0, description="Steps between evaluations; 0 means only at start and end."
    )
    save_steps: int = Field(
        default=500, ge=0, description="Steps between checkpoints; 0 means only the final model."
    )
    save_total_limit: int = Field(default=2, ge=1, description="Newest checkpoints kept on disk.")
    output_dir: str = Field(default="runs/default", min_length=1, description="Folder of the run.")
    overwrite_output_dir: bool = Field(
        default=False,
        description="Start a new run in a folder that already holds one, which is an error"
        " otherwise.",
    )


class LoggingConfig(Section):
    """What is reported, where and how often."""

    report_to: list[str] = Field(
        default_factory=lambda: ["tensorboard"],
        description="Trackers of accelerate (tensorboard, wandb, ...) that get the metrics beside"
        " metrics.jsonl.",
    )
    logging_steps: int = Field(
        default=1, ge=1, description="Steps between two records of the metrics."
    )
    thought_steps: int = Field(
        default=25,
        ge=0,
        description="Steps between two decoded thoughts on the terminal; 0 means none.",
    )
