"""Quiet-STaR for any Hugging Face causal language model (arXiv 2403.09629).

The public names load on first use, so that ``import quietstar`` needs no torch. transformers' Auto
classes know models that think, whichever of the two packages is imported first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from quietstar.config import Config as Config
    from quietstar.model.quiet_star import QuietStarForCausalLM as QuietStarForCausalLM

__version__ = "0.2.0"

_PUBLIC = {"Config": "quietstar.config", "QuietStarForCausalLM": "quietstar.model.quiet_star"}

__all__ = ["Config", "QuietStarForCausalLM", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register_post_import_hook(
    lambda _: import_module("quietstar.model.configuration"),
    "transformers.models.auto.configuration_auto",
)
