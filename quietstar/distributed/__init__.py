"""How DDP, DeepSpeed and FSDP2 differ from a single process: one strategy class for each.

A strategy's wrapper acts in the forward of the module that it wraps: there it gathers sharded
weights and prepares for gradients. Whatever reads weights must therefore go through the forward of
one outer module, `WrappedModule`: the training step, evaluations and samples alike.
"""

from accelerate import Accelerator
from accelerate.utils import DistributedType

from quietstar.config import Config
from quietstar.distributed.sharded import (
    DeepSpeedStrategy,
    FSDP2Strategy,
    ZeRO3Strategy,
    wants_fsdp,
)
from quietstar.distributed.strategies import (
    GROUPS,
    Group,
    ModelProxy,
    Strategy,
    WrappedModule,
    from_main_process,
    group_of,
)

__all__ = [
    "GROUPS",
    "Group",
    "ModelProxy",
    "Strategy",
    "WrappedModule",
    "build_strategy",
    "from_main_process",
    "group_of",
    "wants_fsdp",
]


def build_strategy(accelerator: Accelerator, config: Config) -> Strategy:
    """Returns the strategy of this launch; raises `UserError` if it cannot serve the config."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.deepspeed_plugin
        kind = ZeRO3Strategy if plugin and plugin.zero_stage == 3 else DeepSpeedStrategy
    else:
        kind = FSDP2Strategy if wants_fsdp() else Strategy
    strategy = kind(accelerator)
    strategy.check(config)
    return strategy
