"""The sections of a config: frozen, typed, with a text below each key.

The text is the key's description: ``quietstar train --help`` prints it with the type, the bounds
and the default. `quietstar.config.tree` puts the sections together and adds ``loss``.
"""

import math
import os
import re
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from quietstar.errors import reason_of
from quietstar.system.limits import limited

MOST_CHARACTERS = 10_000  # of a text in a config
MOST_LEVELS = 20  # of a mapping within a mapping
MOST_BYTES_OF_A_NAME = 255  # what file systems take between two slashes


def _check_text(text: str) -> str:
    """Refuse what no file, tokenizer or terminal takes as text."""
    if "\0" in text:
        raise ValueError("must not hold a NUL character")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("must not hold half a surrogate pair") from None
    return text


def _check_name(name: str) -> str:
    """Expand ``~``; refuse what cannot name a file, a folder or anything on the hub."""
    if not name.strip():
        raise ValueError("must not be blank")
    expanded = os.path.expanduser(_check_text(name))
    if expanded.startswith("~"):
        raise ValueError("must name a user who has a home folder after the ~")
    if max(len(os.fsencode(part)) for part in expanded.split("/")) > MOST_BYTES_OF_A_NAME:
        raise ValueError(f"must have at most {MOST_BYTES_OF_A_NAME} bytes between slashes")
    return expanded


def _check_plain(data: dict[str, Any]) -> dict[str, Any]:
    """Refuse entries that no YAML or JSON file can hold."""
    nodes: list[tuple[str, Any, int]] = [("", data, 1)]
    while nodes:
        name, value, level = nodes.pop()
        if level > MOST_LEVELS:
            raise ValueError(f"must not be nested deeper than {MOST_LEVELS}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"must hold finite numbers, and {name} is {value}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"must hold numbers below 2**63, unlike {name}")
        children: list[tuple[Any, Any]] = []
        if isinstance(value, dict):
            children = list(value.items())
        elif isinstance(value, list):
            children = list(enumerate(value))
        for text in (value, *(key for key, _ in children)):
            if isinstance(text, str):
                _check_text(text)
        nodes += [(f"{name}.{key}".lstrip("."), child, level + 1) for key, child in children]
    return data


def _check_pattern(pattern: str) -> str:
    """Refuse what is no regular expression."""
    try:
        re.compile(pattern, re.MULTILINE)
    except (re.error, OverflowError, RecursionError) as problem:
        raise ValueError(f"must be a regular expression of Python ({reason_of(problem)})") from None
    return pattern


def is_template(field: str) -> bool:
    """Tells whether the name of a record's field is a Jinja template instead."""
    return "{{" in field or "{%" in field


@cache
def compile_field(template: str) -> Template:
    """Compile a template of a record's fields, which has no way to files or to code."""
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        # Null is empty, as in a field that is named.
        finalize=lambda value: "" if value is None else value,
    )
    return environment.from_string(template)


def _check_field(field: str) -> str:
    """Refuse a Jinja template that cannot be compiled, which computes its constants."""
    if is_template(field):
        try:
            with limited():
                compile_field(field)
        except Exception as problem:
            reason = reason_of(problem).rstrip(".")
            raise ValueError(f"must be a field's name or a Jinja template ({reason})") from None
    return field


def _check_schedule(points: list[dict[str, int]]) -> list[dict[str, int]]:
    """Refuse points of a schedule that change nothing, or are out of order."""
    for point in points:
        if point.keys() <= {"step"} or "step" not in point:
            raise ValueError("must hold points such as {step: 100, length: 4, lookahead: 2}")
        if not all(point[key] >= 1 for key in point.keys() - {"step"}) or point["step"] < 0:
            raise ValueError("must hold lengths and lookaheads of at least 1, and steps from 0 on")
    steps = [point["step"] for point in points]
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError("must hold points in the order of their steps, each once")
    return points


def _check_fraction_or_number(value: float) -> float:
    """Refuse a number of positions that is not whole."""
    if value > 1 and value != int(value):
        raise ValueError("must be a share of at most 1, or a whole number of positions")
    return value


def _check_once(names: list[str]) -> list[str]:
    """Refuse a name that stands in a list twice."""
    if len(set(names)) < len(names):
        raise ValueError("must hold each name once")
    return names


Text = Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS), AfterValidator(_check_text)]
Name = Annotated[str, Field(min_length=1, max_length=4095), AfterValidator(_check_name)]
"""Of a file or folder, or of something on the hub; a leading ``~`` is expanded."""
Texts = Annotated[list[Text], Field(max_length=1000)]
Controls = Annotated[
    list[Literal["swapped", "shuffled", "pause", "generic", "blank"]], AfterValidator(_check_once)
]
FieldOrTemplate = Annotated[Text, AfterValidator(_check_field)]
"""The name of a record's field, or a Jinja template that makes a text of the record's fields."""
Pattern = Annotated[Text, AfterValidator(_check_pattern)]
PlainData = Annotated[dict[str, Any], AfterValidator(_check_plain)]
Schedule = Annotated[
    list[
        dict[
            Literal["step", "length", "lookahead"],
            Annotated[int, Field(ge=-(2**20), le=2**20)],
        ]
    ],
    AfterValidator(_check_schedule),
]
FractionOrNumber = Annotated[
    float,
    Field(ge=1e-4, le=2**20),
    AfterValidator(_check_fraction_or_number),
]
StageName = Annotated[str, Field(pattern=r"^[\w-]{1,100}$")]

Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Scale = Annotated[float, Field(gt=0, le=1e6)]
LearningRate = Annotated[float, Field(gt=0, le=10.0)]
Temperature = Annotated[float, Field(ge=1e-3, le=1e3)]
PerToken = Annotated[float, Field(ge=-1e6, le=1e6)]
ShareOfMean = Annotated[float, Field(ge=0, le=1e3)]
ClipLow = Annotated[float, Field(gt=0, le=1.0)]
ClipHigh = Annotated[float, Field(gt=0, le=1e6)]
LossWeight = Annotated[float, Field(ge=0, le=1e9)]
Steps = Annotated[int, Field(ge=1, le=10**9)]
StepsOrNone = Annotated[int, Field(ge=0, le=10**9)]
Tokens = Annotated[int, Field(ge=1, le=2**20)]
Sequences = Annotated[int, Field(ge=1, le=2**20)]
Width = Annotated[int, Field(ge=1, le=2**17)]

THINKING_TYPE = "quiet_star"
"""``model_type`` of a saved model that thinks."""
SYNTHETIC = "synthetic:"
GYM = "reasoning_gym:"


class Section(BaseModel):
    """Base of all sections: frozen, strict types, no unknown keys, finite numbers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The base model: pretrained (name_or_path), or with random weights (config)."""

    name_or_path: Name | None = None
    """Hub id (owner/name, or owner/name@revision) or folder of the pretrained model (or set
    model.config instead)."""
    config: PlainData | None = None
    """Inline architecture for a model with random weights: model_type and fields of its
    transformers config."""
    tokenizer: Name | None = None
    """Folder or hub id of the tokenizer, `bytes` for the built-in byte-level one, or
    `synthetic:<task>` for that task's words; null means the model's own, and model.config needs
    one."""
    trust_remote_code: bool = False
    """Run the model code that comes with a model from the hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights in memory; training.mixed_precision is that of the arithmetic."""


class BottleneckOptions(Section):
    """Of houlsby and mlp_adapter."""

    adapter_size: Width = 64


class PromptOptions(Section):
    """Of prompt."""

    num_virtual_tokens: Tokens = 16


class PrefixOptions(PromptOptions):
    """Of prefix."""

    encoder_hidden_size: Width | None = None


class GaloreOptions(Section):
    """Of galore."""

    rank: Width = 128
    update_proj_gap: Steps = 200
    scale: Scale = 0.25


TUNING_OPTIONS: dict[str, type[Section]] = {
    "houlsby": BottleneckOptions, "mlp_adapter": BottleneckOptions, "prompt": PromptOptions,
    "prefix": PrefixOptions, "galore": GaloreOptions,
}  # fmt: skip
"""What ``tuning.options`` may hold by ``tuning.method``; nothing with the others."""


class TuningConfig(Section):
    """Which weights of the base model train."""

    # fmt: off
    method: Literal[
        "full", "lora", "rslora", "dora", "qlora", "ia3", "houlsby", "mlp_adapter", "prompt",
        "prefix", "galore",
    ] = "full"
    # fmt: on
    """Train all weights of the base model, or a small addition to frozen ones: low-rank adapters
    (plain, rank-stabilized, with magnitudes, on 4-bit weights), scales (ia3), bottleneck adapters
    (after attention and MLP, or MLP only), virtual tokens (prompt: their embeddings; prefix: their
    keys and values in every layer); galore: all weights by low-rank gradients. The mixing head
    trains too, unless mixing_head.fixed_weight is set, and so do the two embeddings, unless
    thoughts.train_markers is false."""
    lora_r: Width = 16
    """Rank of the adapters."""
    lora_alpha: Scale = 32.0
    """Scale of the adapters, whose output is multiplied by alpha / rank."""
    lora_target_modules: Annotated[Texts, Field(min_length=1)] | None = None
    """Names of the layers that get adapters; null means all linear layers of the decoder (ia3:
    keys, values and the MLP's output)."""
    options: PlainData = {}
    """Settings of some methods: adapter_size (64) of houlsby and mlp_adapter; num_virtual_tokens
    (16) of prompt and prefix; encoder_hidden_size of prefix, the width of an MLP that makes its
    keys and values while they train (null: none); rank (128), update_proj_gap (200), and scale
    (0.25) of galore."""
    unfreeze: Texts = []
    """Parameters of the base model that train with what the method adds, by the end of their
    names; * matches anything: layers.29.*, embed_tokens.weight."""

    @property
    def method_options(self) -> Any:
        """The method's options, with their defaults.

        Raises:
            pydantic.ValidationError: The method has none of this name, or of this value.
        """
        return TUNING_OPTIONS.get(self.method, Section).model_validate(self.options)


class ThoughtsConfig(Section):
    """Where the model thinks, how long, how often, and how thoughts are sampled."""

    sampler: Text = "rollout"
    """Where thoughts come from: rollout (the model samples them, all positions in parallel), pause
    (a constant token, the first of thoughts.start_init, in their place: a control that thinks
    nothing), or a sampler of your own as module:name."""
    # fmt: off
    positions: Literal[
        "all", "every", "random", "entropy", "top_entropy", "weight", "weighted_entropy",
        "one_random", "answer", "answer_start", "pattern", "field",
    ] = "all"
    # fmt: on
    """Where the text thinks: before all tokens; before a share or number of them
    (thoughts.position_fraction) that is evenly spaced (every), random,
    hardest to predict (entropy; top_entropy: among the 16 most likely tokens), given most weight by
    the mixing head, or highest in the product of both; before one random token (one_random); before
    the tokens of an answer, or its first one; or where thoughts.pattern or data.positions_field
    says."""
    position_fraction: FractionOrNumber = 0.25
    """Share of a text's targets that get a thought, for rules that take one (every n-th is a share
    of 1/n); above 1 their number, which a text with fewer targets does not reach."""
    pattern: Pattern | None = None
    """Regular expression of Python for positions pattern, in which ^ and $ match at every line: the
    model thinks before the token with the first character of each match, or of its group 1."""
    length: Tokens = 8
    """Free tokens of a thought, the most where thoughts.stop lets it end early; its start and end
    are not counted."""
    stop: Texts = []
    """Texts that end a thought once the model has written one of them, as end-of-text then does
    too; with none, every thought has all its tokens."""
    lookahead: Tokens = 4
    """True tokens after the position that a thought is scored on."""
    num_thoughts: Annotated[int, Field(ge=1, le=1000)] = 2
    """Thoughts sampled at each position."""
    schedule: Schedule = []
    """Length and lookahead by steps of the stage, as [{step: 100, length: 4, lookahead: 2}]: they
    begin as thoughts.length and thoughts.lookahead, which bound them, and what a point leaves out
    stays as it is. The model is saved with those of its last step."""
    temperature: Temperature = 1.0
    """Temperature at which thought tokens are sampled in training."""
    top_p: Annotated[float, Field(gt=0, le=1.0)] | None = None
    """Sample thought tokens in training among the most likely ones that together reach this
    probability; null means all. The policy term then still scores them by the full distribution,
    which biases its gradient."""
    top_k: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """Sample thought tokens in training among so many of the most likely ones; null means all. The
    policy term is as with thoughts.top_p."""
    start_init: Text = "---"
    """Text that opens every thought: one vector for each of its tokens, which starts as the token's
    input embedding."""
    end_init: Text = "---"
    """Text that closes every thought, in the same way."""
    train_markers: bool = True
    """Train the vectors that open and close thoughts; false keeps them the tokens' own input
    embeddings, so that a plain model can make and read such thoughts."""


class MixingHeadConfig(Section):
    """The mixing head: how far the thought's prediction replaces the base prediction."""

    initial_weight: BelowOne = 0.12
    """Mixing weight at the start of training. The head ends in a sigmoid, which keeps the weight
    in (0, 1); with 0 it has none and is the paper's unbounded head."""
    floor: BelowOne = 0.0
    """Lower bound of the mixing weight, so that it cannot collapse to 0 while thoughts are still
    useless (saved with the head)."""
    warmup_steps: StepsOrNone = 0
    """First steps in which warmup_weight replaces the head's output."""
    warmup_weight: Fraction = 0.5
    """Fixed mixing weight during warmup_steps."""
    fixed_weight: Fraction | None = None
    """Constant in place of the head's output, in training after warmup_steps and wherever the
    model thinks (saved with the head); 1 predicts by the thought alone, null asks the head."""


class JudgeConfig(Section):
    """Who judges what the model writes after its thoughts, for rewards that ask."""

    model: Name | None = None
    """Folder or hub id of the causal LM that judges (loss.reward: judge), or of the sequence
    classifier that scores (reward_model); null means the base of the model that trains, with its
    adapters switched off."""
    mode: Literal["rating", "pairs"] = "rating"
    """How a causal LM judges: by its expected rating of each text from 1 to 10, mapped to [-1, 1],
    or by the mean probability that it prefers the text to those of the position's other thoughts
    (K (K - 1) questions for K different texts)."""
    template: Name = "continuation"
    """What a causal LM is asked: continuation, answer, summary, or a Jinja file of yours."""
    rationale: Annotated[int, Field(ge=0, le=10**5)] = 0
    """Most tokens of a rationale before each verdict; 0 asks for none."""
    continuation: Tokens | None = None
    """Most tokens that the model writes after a thought, which are judged; null means
    thoughts.lookahead."""


class DataConfig(Section):
    """The text to train on, and how it is cut into sequences."""

    train: Name | None = None
    """Training text, required: a .jsonl, .json, .txt or .parquet file, a folder of them, a data set
    of the hub (its id, with id:split or id:subset:split another split than train), or
    reasoning_gym:<task> or synthetic:<task>."""
    eval: Name | None = None
    """Held-out text, given like data.train; null holds out a share of data.train."""
    eval_fraction: Annotated[float, Field(gt=0, le=0.9)] = 0.05
    """Share of data.train held out when data.eval is null."""
    eval_sequences: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """Largest number of sequences in an evaluation; null chooses 16 to 512 (64 of raw text), so
    that evaluations take less time than the training between them (64 of a stream's head)."""
    format: Literal["text", "qa", "chat"] = "text"
    """Records are raw text, questions with answers (joined by data.template), or chats (their field
    messages, through the tokenizer's chat template)."""
    text_field: FieldOrTemplate = "text"
    """Field of a record with the text (format text), or a Jinja template that makes it of the
    record's fields, such as '{{ title }}: {{ body }}'."""
    question_field: FieldOrTemplate = "question"
    """Field of a record with the question (format qa), or a Jinja template of its fields."""
    answer_field: FieldOrTemplate = "answer"
    """Field of a record with the answer (format qa), or a Jinja template of its fields, such as
    "{{ answer.split('####')[-1].strip() }}". Where records have choices, answer is one of them or
    its index, and answerKey the label of one that the question then shows."""
    rationale_field: FieldOrTemplate | None = None
    """Field of a record with the gold reasoning that leads to its answer (format qa), or a Jinja
    template of its fields; evaluations compare thoughts with it, and it is never trained on."""
    positions_field: Text | None = None
    """Field of a record with a list of character offsets into its text (formats qa and chat: into
    the text that is made of it), for thoughts.positions field: the model thinks before the tokens
    that hold those characters."""
    template: Text = "{question}\n{answer}"
    """Text of a qa record: {question}, then {answer}, then at most white space."""
    spans: Literal["random", "concatenate"] = "random"
    """One random span of a document per visit, as in the paper, or documents joined by end-of-text
    and cut into chunks."""
    loss_on: Literal["all", "answer"] = "all"
    """Think and learn at all tokens, or only at those of the answer (formats qa and chat)."""
    seq_len: Annotated[int, Field(ge=2, le=2**20)] = 256
    """Tokens of a training sequence."""
    min_context: Tokens = 1
    """First tokens of a sequence that are no targets. A pretrained model predicts badly from the
    very first token, which serves as an attention sink, and any thought improves on that; a few
    more tokens keep this effect out of the gain."""
    streaming: bool = False
    """Read a hub data set while training instead of downloading it first."""
    task_options: PlainData = {}
    """Options of the reasoning_gym or synthetic task; size is the number of problems (10,000)."""


class OptimConfig(Section):
    """AdamW and its schedule."""

    name: Literal["adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw_torch"
    """AdamW of torch, or of bitsandbytes (extra qlora) with moments of 32 or 8 bits, in pages that
    leave a CUDA GPU whose memory is full."""
    learning_rate: LearningRate = 1e-4
    """Learning rate of the base model or its adapters."""
    mixing_head_learning_rate: LearningRate | None = None
    """Learning rate of the mixing head; null means optim.learning_rate."""
    embedding_learning_rate: LearningRate | None = None
    """Learning rate of the start and end embeddings; null means optim.learning_rate."""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.001
    """Decoupled weight decay."""
    betas: Annotated[list[BelowOne], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Decay of AdamW's running means of gradients and of squared gradients."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 at the last step."""
    warmup_steps: StepsOrNone = 20
    """Steps in which the learning rates rise from 0 to their values."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1e12)] = 1.0
    """Norm to which a longer gradient is clipped."""


class TrainingConfig(Section):
    """The loop: steps, batch, precision, evaluations, checkpoints."""

    max_steps: Steps = 1000
    """Optimizer steps."""
    global_batch_size: Sequences = 8
    """Sequences per optimizer step, over all processes and micro-batches."""
    micro_batch_size: Sequences = 1
    """Most sequences in one forward pass of a process; it need not divide global_batch_size."""
    inner_epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    """Optimizer updates in every step, all from the thoughts that its first one drew: later ones
    weigh by the ratio of the thoughts' probabilities (loss.clip_low, loss.clip_high)."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Arithmetic: bfloat16 autocast, or none (the weights' own data type)."""
    cpu_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads of each process without a GPU; null shares the cores among the processes of the
    machine, where accelerate launch would give each one thread."""
    learn_chunk_tokens: Annotated[int, Field(ge=1, le=10**9)] | Literal["auto"] | None = "auto"
    """Most tokens of thoughts that learn at once, forward and backward, before the next ones: fewer
    take less memory, at no cost until matrix products get small. Texts of more tokens in all are
    recomputed in the backward pass. null: all at once. auto: 5120 (4096 with gradient
    checkpointing), 16384 on a GPU; null under ZeRO-3 and FSDP2, which cannot do it in groups."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    torch_compile: bool = False
    """torch.compile of the decoder layers: shorter steps after about half a minute of compiling.
    Needs a C++ compiler; not available under ZeRO-3 and FSDP2."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of a moving average of the weights that stays in each step, as 0.999; null: no average.
    It begins anew with every stage, is saved with checkpoints and, at the end, as the model ema/
    next to final/."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of data order, sampled thoughts and new weights."""
    eval_steps: StepsOrNone = 100
    """Steps between evaluations; 0 means only at start and end."""
    eval_controls: Controls = ["swapped", "pause"]
    """Controls of each evaluation: the same texts with the thoughts of another one (swapped; the
    gain of content needs it), with their tokens reordered (shuffled), with one constant token in
    place of each of theirs (pause), with one text for all (generic), or empty (blank). Each takes
    one more pass, in which nothing is sampled."""
    save_steps: StepsOrNone = 500
    """Steps between checkpoints; 0 means only the final model."""
    save_total_limit: Annotated[int, Field(ge=1, le=10**6)] = 2
    """Number of newest checkpoints that stay on disk."""
    stop_on_collapse: bool = False
    """End the run, with a checkpoint and an error, when a guard of collapse or divergence fires
    (docs/metrics.md); by default guards only warn."""
    rank_timeout: Annotated[
        int,
        Field(ge=10, le=10**6),
    ] = 600
    """Seconds for which a process of a launch may be silent (stopped, or on a machine that is)
    before the launch ends."""
    output_dir: Name = "runs/default"
    """Folder of the run."""


class LoggingConfig(Section):
    """What is reported, where and how often."""

    report_to: Texts = ["tensorboard"]
    """Trackers of accelerate (tensorboard, wandb, ...) that get the metrics, too, as does
    metrics.jsonl."""
    logging_steps: Steps = 1
    """Steps between two records of the metrics."""
    thought_steps: StepsOrNone = 25
    """Steps between two decoded thoughts on the terminal; 0 means none."""
