"""Quiet-STaR for any Hugging Face causal language model (arXiv 2403.09629).

The public names load on first use, so that ``import quietstar`` needs no torch. transformers' Auto
classes know models that think, whichever of the two packages is imported first.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from quietstar.version import __version__ as __version__

if TYPE_CHECKING:
    from quietstar.config import Config as Config
    from quietstar.model.quiet_star import QuietStarForCausalLM as QuietStarForCausalLM
    from quietstar.trainer import QuietStarConfig as QuietStarConfig
    from quietstar.trainer import QuietStarTrainer as QuietStarTrainer

_PUBLIC = {
    "Config": "quietstar.config",
    "QuietStarConfig": "quietstar.trainer",
    "QuietStarForCausalLM": "quietstar.model.quiet_star",
    "QuietStarTrainer": "quietstar.trainer",
}

__all__ = ["Config", "QuietStarConfig", "QuietStarForCausalLM", "QuietStarTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_AUTO_CLASSES = "transformers.models.auto.configuration_auto"


class _Registration:
    """Finds transformers' Auto classes as Python does, and registers ours once they are loaded."""

    _searches = False

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _AUTO_CLASSES or cls._searches:
            return None
        cls._searches = True
        spec: Any = find_spec(name)
        cls._searches = False
        load = spec.loader.exec_module

        def load_and_register(module: Any) -> None:
            load(module)
            if cls in sys.meta_path:
                sys.meta_path.remove(cls)  # pyright: ignore[reportArgumentType]
            import_module("quietstar.model.configuration")

        spec.loader.exec_module = load_and_register
        return spec


if _AUTO_CLASSES in sys.modules:
    import_module("quietstar.model.configuration")
else:
    sys.meta_path.insert(0, _Registration)  # pyright: ignore[reportArgumentType]
