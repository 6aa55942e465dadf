"""torch.compile of the decoder layers, one by one: fewer, larger kernels around the attention.

Layers share their compiled code, so compiling takes as long for 4 of them as for 40. The attention
is ours and runs as it is; norms, rotary embeddings, projections and MLP are compiled.
"""

from __future__ import annotations

import os
import shutil

import torch
from transformers import PreTrainedModel

from quietstar.backbone.run import decoder_layers
from quietstar.errors import UserError

_RECOMPILE_LIMIT = 64
"""Kinds of calls compiled for: text, rollout, groups of blocks, with and without gradient, each in
a few shapes, and the evaluations. By default torch gives up after 8."""

COMPILERS = ("g++", "c++", "clang++")


def find_compiler() -> str | None:
    """Find the C++ compiler that torch.compile would call: that of ``CXX``, or one on the PATH."""
    names = os.environ.get("CXX", "").split()[:1] or COMPILERS
    return next((path for path in map(shutil.which, names) if path is not None), None)


def check_compile(wanted: bool, sharded: bool) -> None:
    """Refuse ``training.torch_compile`` where it cannot work.

    Raises:
        UserError: The weights are sharded, or there is no compiler.
    """
    if wanted and sharded:
        raise UserError(
            "training.torch_compile: true cannot be used where weights are sharded (ZeRO-3, FSDP2)."
            " Set training.torch_compile: false, or launch with configs/accelerate/zero2.yaml."
        )
    if wanted:
        require_compiler("training.torch_compile: true", "set training.torch_compile: false")


def require_compiler(setting: str, remedy: str) -> None:
    """Refuse a setting that compiles where nothing can; ``remedy`` is what to do instead.

    Raises:
        UserError: There is no compiler.
    """
    if find_compiler() is None:
        raise UserError(
            f"{setting} needs a C++ compiler, and there is none here ({', '.join(COMPILERS)}; CXX "
            f"names another). Install one (apt install g++), or {remedy}."
        )


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> int:
    """Compile the decoder layers of a causal LM in place, at their first call; returns how many.

    State dicts and what wraps the layers stay as they are.

    Raises:
        UserError: The architecture's layers are not to be found.
    """
    layers = decoder_layers(model, "training.torch_compile: false")
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    for layer in layers:
        layer.compile(backend=backend)
    return len(layers)
