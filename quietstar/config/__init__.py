"""The config of a training run: one frozen, typed tree.

Each field has its bounds and one sentence; ``quietstar train --help`` prints both. Rules that tie
fields together are in `rules`. Unknown keys are errors, and so is a value of another type (the text
``"8"`` is no integer). `quietstar.config.loading` reads and writes the tree as YAML.

Nothing here imports torch, so that a wrong config is reported at once.
"""

from quietstar.config.method import (
    LossConfig,
    MixingHeadConfig,
    ModelConfig,
    ThoughtsConfig,
    TuningConfig,
)
from quietstar.config.rules import CrossFieldProblem, cross_field_problems
from quietstar.config.run import DataConfig, LoggingConfig, OptimConfig, TrainingConfig
from quietstar.config.schema import (
    CROSS_FIELD_ERROR,
    SECTIONS,
    Config,
    Stages,
    is_stage_key,
)
from quietstar.config.section import Section

__all__ = [
    "CROSS_FIELD_ERROR",
    "SECTIONS",
    "Config",
    "CrossFieldProblem",
    "DataConfig",
    "LoggingConfig",
    "LossConfig",
    "MixingHeadConfig",
    "ModelConfig",
    "OptimConfig",
    "Section",
    "Stages",
    "ThoughtsConfig",
    "TrainingConfig",
    "TuningConfig",
    "cross_field_problems",
    "is_stage_key",
]
