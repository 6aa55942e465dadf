"""Loads models to evaluate: saved Quiet-STaR models and plain ones."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from quietstar.errors import UserError
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.saving import SETTINGS_FILE

_PIECE = 2**20  # bytes
_MOST_PIECES = 64


def load_thinker(
    name: str, needs_training: bool, dtype: str | torch.dtype, remedy: str, **hub: Any
) -> QuietStarForCausalLM:
    """Load a saved Quiet-STaR model, or a plain one with vectors and head never trained.

    One token is predicted behind each thought, so its lookahead is 1.

    Args:
        name: Folder, or hub id of a plain model.
        needs_training: Refuse a plain model, with ``remedy`` in the message.
        dtype: Data type of the weights.
        remedy: Advice about a plain model.
        **hub: ``revision``, ``trust_remote_code``.

    Raises:
        UserError: There is no such model, or it is plain where a trained one is needed.
    """
    path = Path(name).expanduser()
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise UserError(f"--model: there is no folder {name}")
    if (path / SETTINGS_FILE).exists():
        model = QuietStarForCausalLM.from_pretrained(name, dtype=dtype, **hub)
    elif needs_training:
        raise UserError(
            f"{name} is no Quiet-STaR model ({SETTINGS_FILE} is missing), and thoughts are asked "
            f"for. {remedy}"
        )
    else:
        model = QuietStarForCausalLM.from_base(name, dtype=dtype, **hub)
    model.configure(model.thoughts.model_copy(update={"lookahead": 1}))
    return model.eval()


def fingerprint(name: str) -> str:
    """Hash the names, sizes and pieces of a folder's weights; give a hub model's name as it is."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("quietstar*.json")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        step = max(_PIECE, size // _MOST_PIECES)
        with path.open("rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]
