"""The whole config, and the configs of its stages."""

from typing import Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from quietstar.config.method import (
    LossConfig,
    MixingHeadConfig,
    ModelConfig,
    ThoughtsConfig,
    TuningConfig,
)
from quietstar.config.rules import cross_field_problems
from quietstar.config.run import DataConfig, LoggingConfig, OptimConfig, TrainingConfig
from quietstar.config.section import Section

CROSS_FIELD_ERROR = "cross_field"  # type of the pydantic error that carries the problems

RUN_SECTIONS = frozenset({"model", "tuning", "logging"})
RUN_KEYS = frozenset(
    f"{section}.{name}"
    for section, names in {
        "mixing_head": ("activation", "initial_weight", "hidden_size", "floor"),
        "training": (
            *(
                "mixed_precision",
                "cpu_threads",
                "learn_chunk_tokens",
                "gradient_checkpointing",
                "seed",
            ),
            *("torch_compile", "save_steps"),
            *("save_total_limit", "output_dir", "overwrite_output_dir"),
        ),
    }.items()
    for name in names
)
"""Keys that hold for the whole run; a stage may change all others."""

Stages = dict[str, dict[str, dict[str, Any]]]


def is_stage_key(key: str) -> bool:
    """Whether a stage may change this key."""
    return key.partition(".")[0] not in RUN_SECTIONS and key not in RUN_KEYS


class Config(Section):
    """The whole tree.

    A run is one stage, or several (`stages`): each changes some keys for its part of the run and
    starts from the weights of the one before.

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
    stages: Stages = Field(
        default_factory=dict,
        description="Stages of the run by name, in order, each with the keys it changes; none"
        " means that the run is one stage.",
    )

    @model_validator(mode="after")
    def _check_rules(self) -> "Config":
        if self.stages:
            _check_stage_keys(self.stages)
            self.stage_configs()  # each checks its own fields and rules
            return self
        problems = cross_field_problems(self)
        if problems:
            lines = "\n".join(f"{problem.keys[0]}: {problem.message}" for problem in problems)
            context = {"lines": lines, "problems": problems}
            raise PydanticCustomError(CROSS_FIELD_ERROR, "{lines}", context)
        return self

    def stage_configs(self) -> dict[str, "Config"]:
        """The whole config of each stage, by name, in order.

        A config that names no stages is one, called ``train``.
        """
        if not self.stages:
            return {"train": self}
        common = self.model_dump(exclude={"stages"})
        return {
            name: Config.model_validate(
                {key: value | changes.get(key, {}) for key, value in common.items()}
            )
            for name, changes in self.stages.items()
        }


def _check_stage_keys(stages: Stages) -> None:
    for stage, sections in stages.items():
        for section, values in sections.items():
            for name in values:
                if not is_stage_key(f"{section}.{name}"):
                    raise ValueError(f"stages.{stage}: {section}.{name} holds for the whole run")


SECTIONS = tuple(name for name in Config.model_fields if name != "stages")
"""Names of the sections, in order."""
