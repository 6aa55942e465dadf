"""Which weights train: the whole model, or something small beside frozen ones.

- ``full``, ``galore``: all weights (GaLore is a matter of the optimiser).
- ``lora``, ``rslora``, ``dora``, ``qlora``, ``ia3``: by PEFT (`peft_methods`).
- ``houlsby``, ``mlp_adapter``: bottleneck adapters (`quietstar.model.tuning.bottleneck`).
- ``prompt``, ``prefix``: learned virtual tokens (`quietstar.model.tuning.virtual_tokens`).

The mixing head and the two learned vectors train with every method.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from quietstar.config import TuningConfig
from quietstar.errors import UserError
from quietstar.model.tuning.bottleneck import add_bottlenecks
from quietstar.model.tuning.peft_methods import PEFT_METHODS, add_peft
from quietstar.model.tuning.virtual_tokens import add_virtual_tokens

WHOLE = ("full", "galore")
"""Methods that train, and save, all weights."""

__all__ = ["PEFT_METHODS", "WHOLE", "apply_tuning", "beside_peft"]


def apply_tuning(model: PreTrainedModel, tuning: TuningConfig) -> nn.Module:
    """The model as it trains: itself with what the method adds, or a PEFT model around it.

    Raises:
        UserError: A name in the settings fits nothing in the model.
    """
    if tuning.method in WHOLE:
        return model
    model.requires_grad_(False)
    if tuning.method in PEFT_METHODS:
        tuned: nn.Module = add_peft(model, tuning)
    else:
        tuned = model
        if tuning.method in ("houlsby", "mlp_adapter"):
            add_bottlenecks(model, tuning)
        else:
            add_virtual_tokens(model, tuning)
    unfreeze(tuned, tuning.unfreeze)
    return tuned


def unfreeze(model: nn.Module, patterns: list[str]) -> None:
    """Let parameters train whose name ends in one of the patterns (``*`` stands for anything).

    Raises:
        UserError: A pattern fits no parameter.
    """
    for pattern in patterns:
        fitting = [p for n, p in model.named_parameters() if fnmatchcase(n, f"*{pattern}")]
        if not fitting:
            example = next(name for name, _ in model.named_parameters())
            example = example.removeprefix("base_model.model.")  # PEFT's own
            raise UserError(
                f"tuning.unfreeze: {pattern!r} fits no parameter; names are like {example!r}. "
                "Write for instance [layers.0.*] or [embed_tokens.weight]."
            )
        for parameter in fitting:
            parameter.requires_grad_(True)


def beside_peft(name: str) -> bool:
    """Whether a trained parameter of the language model is one that PEFT does not save."""
    return not any(mark in name for mark in ("lora_", "ia3_"))
