"""Sections that say what model thinks and learns, and how: keys, types, bounds, a sentence."""

from typing import Any, Literal

from pydantic import Field

from quietstar.config.section import Section


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
        description="Type of the weights held in memory; training.mixed_precision is that of the"
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
    lora_r: int = Field(default=16, ge=1, description="Rank of the adapters.")
    lora_alpha: float = Field(
        default=32.0, gt=0, description="Scale of the adapters, whose output is times alpha / rank."
    )
    lora_target_modules: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Names of the layers that get adapters; null means all linear layers of the"
        " decoder (ia3: keys, values and the MLP's output).",
    )
    adapter_size: int = Field(
        default=64, ge=1, description="Width of bottleneck adapters (houlsby, mlp_adapter)."
    )
    num_virtual_tokens: int = Field(
        default=16, ge=1, description="Virtual tokens before every text (prompt, prefix)."
    )
    galore_rank: int = Field(default=128, ge=1, description="Rank of the gradients (galore).")
    galore_update_proj_gap: int = Field(
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

    sampler: Literal["rollout", "pause"] = Field(
        default="rollout",
        description="Thoughts that the model samples, or a constant token in their place, the first"
        " of thoughts.start_init: a control that thinks nothing.",
    )
    positions: Literal[
        "all", "every", "random", "entropy", "weight", "weighted_entropy", "answer", "answer_start"
    ] = Field(
        default="all",
        description="Where the text thinks: before all tokens; before evenly spaced, random, or the"
        " hardest to predict ones, or those where the mixing head expects most of a thought, or by"
        " the product of both (thoughts.position_fraction of them);"
        " or before the tokens of an answer, or the"
        " first of them.",
    )
    position_fraction: float = Field(
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

    objective: Literal["quiet_star", "next_token"] = Field(
        default="quiet_star",
        description="Learn to think, or plain language modelling without thoughts.",
    )
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
