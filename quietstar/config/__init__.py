"""The config of a training run: one frozen, typed tree.

`schema` has the sections, `tree` puts them together with the rules that tie keys together,
`loading` reads and writes the tree as YAML, and `messages` words what is wrong. Unknown keys are
errors, and so is a value of another type (the text ``"8"`` is no integer).
"""

# fmt: off
from quietstar.config.schema import (  # noqa: F401, I001
    DataConfig, JudgeConfig, LoggingConfig, MixingHeadConfig, ModelConfig, OptimConfig, Section,
    ThoughtsConfig, TrainingConfig, TuningConfig,
)
from quietstar.config.tree import (  # noqa: F401
    SECTIONS, Config, LossConfig, cross_field_problems, fields, keys_of,
    loss_config,
)
