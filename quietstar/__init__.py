"""Quiet-STaR for any Hugging Face causal language model (arXiv 2403.09629).

The public names load on first use, so that ``import quietstar.config`` needs no torch. Where
transformers is imported already, its Auto classes know of models that think from here on, and else
with the first use of ``QuietStarForCausalLM``.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quietstar.config import Config as Config
    from quietstar.model import QuietStarForCausalLM as QuietStarForCausalLM

__version__ = "0.2.0"

_PUBLIC = {"Config": "quietstar.config", "QuietStarForCausalLM": "quietstar.model"}

__all__ = ["Config", "QuietStarForCausalLM", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


if "transformers" in sys.modules:
    import_module("quietstar.model")
