"""What DDP, DeepSpeed and FSDP do differently from one process, a class for each.

An engine wraps a module and acts in its forward: it gathers weights that lie in pieces, and gets
ready for gradients. So everything that reads weights goes through the forward of one outer module,
the `Trainee`, not only the training step.
"""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType

from quietstar.config import Config
from quietstar.distributed.base import Engine
from quietstar.distributed.fsdp import FullyShardEngine, wants_fsdp
from quietstar.distributed.trainee import ThroughEngine, Trainee
from quietstar.distributed.zero import DeepSpeedEngine

__all__ = ["Engine", "ThroughEngine", "Trainee", "build_engine", "wants_fsdp"]


def build_engine(accelerator: Accelerator, config: Config) -> Engine:
    """The engine of this launch.

    Raises:
        UserError: A way to tune that it cannot serve.
    """
    kind = Engine
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        kind = DeepSpeedEngine
    elif wants_fsdp():
        kind = FullyShardEngine
    engine = kind(accelerator)
    engine.check(config)
    return engine
