"""The config of a training run: one frozen, typed tree.

`schema` has the tree, `rules` what ties its keys together, `loading` reads and writes it as YAML,
`messages` words what is wrong, and `presets` finds the configs that come with the package. Unknown
keys are errors, and so is a value of another type (the text ``"8"`` is no integer).
"""

from quietstar.config import rules as _rules  # noqa: F401  (registers the rules)
from quietstar.config.schema import FIELDS as FIELDS
from quietstar.config.schema import SECTIONS as SECTIONS
from quietstar.config.schema import Config as Config
from quietstar.config.schema import CrossFieldProblem as CrossFieldProblem
from quietstar.config.schema import DataConfig as DataConfig
from quietstar.config.schema import LoggingConfig as LoggingConfig
from quietstar.config.schema import LossConfig as LossConfig
from quietstar.config.schema import MixingHeadConfig as MixingHeadConfig
from quietstar.config.schema import ModelConfig as ModelConfig
from quietstar.config.schema import OptimConfig as OptimConfig
from quietstar.config.schema import Section as Section
from quietstar.config.schema import ThoughtsConfig as ThoughtsConfig
from quietstar.config.schema import TrainingConfig as TrainingConfig
from quietstar.config.schema import TuningConfig as TuningConfig
from quietstar.config.schema import cross_field_problems as cross_field_problems
from quietstar.config.schema import is_stage_key as is_stage_key
from quietstar.config.schema import loss_config as loss_config
