"""The config of a training run: one frozen, typed tree.

`schema` has the tree, `rules` what ties its keys together, `loading` reads and writes it as YAML,
`messages` words what is wrong, and `presets` finds the configs that come with the package. Unknown
keys are errors, and so is a value of another type (the text ``"8"`` is no integer).
"""

from quietstar.config import rules as _rules  # noqa: F401  (registers the rules)
from quietstar.config.schema import (
    FIELDS,
    SECTIONS,
    Config,
    CrossFieldProblem,
    DataConfig,
    LoggingConfig,
    LossConfig,
    MixingHeadConfig,
    ModelConfig,
    OptimConfig,
    Section,
    ThoughtsConfig,
    TrainingConfig,
    TuningConfig,
    cross_field_problems,
    is_stage_key,
)

__all__ = [
    "FIELDS",
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
    "ThoughtsConfig",
    "TrainingConfig",
    "TuningConfig",
    "cross_field_problems",
    "is_stage_key",
]
