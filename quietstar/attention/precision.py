"""Where arithmetic has to be wider than its inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions as float32; float32 and float64 (gradient checks) as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
