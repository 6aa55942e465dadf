"""The module that strategies wrap, and a proxy that calls the model's methods through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from accelerate.utils import extract_model_from_parallel
from torch import nn

from quietstar.model.quiet_star import QuietStarForCausalLM

Group = Literal["language_model", "mixing_head", "embeddings"]
GROUPS: tuple[Group, ...] = ("language_model", "mixing_head", "embeddings")
"""Parameter groups in the optimizer's order; logs use the same names."""


def group_of(name: str) -> Group:
    """Returns the group of a parameter of `QuietStarForCausalLM`, wrapped or not."""
    name = name.removeprefix("module.").removeprefix("model.")
    if name.startswith("language_model."):
        return "language_model"
    return "mixing_head" if name.startswith("mixing_head.") else "embeddings"


class WrappedModule(nn.Module):
    """Forwards to any method of the model: the one door through DDP, FSDP2 and ZeRO.

    Args:
        model: The model to train.
    """

    def __init__(self, model: QuietStarForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, *args: Any, **keywords: Any) -> Any:
        """Calls ``model.method(...)``; ``"forward"`` calls the module itself, with its hooks."""
        if method == "forward":
            return self.model(*args, **keywords)
        return getattr(self.model, method)(*args, **keywords)


def _through_forward(method: str) -> Callable[..., Any]:
    def call(proxy: ModelProxy, *args: Any, **keywords: Any) -> Any:
        return proxy.prepared(method, *args, **keywords)

    return call


class ModelProxy:
    """Offers the model's methods and calls each through the strategy's wrapper.

    Args:
        prepared: A `WrappedModule`, as it is or as the strategy has wrapped it.
    """

    def __init__(self, prepared: nn.Module) -> None:
        self.prepared = prepared

    @property
    def pause_token_id(self) -> int:
        """Token that stands for every thought token in the pause control."""
        wrapped = extract_model_from_parallel(self.prepared)
        assert isinstance(wrapped, WrappedModule), type(wrapped)
        return wrapped.model.pause_token_id

    think = _through_forward("think")
    sample = _through_forward("sample")
    score_plain = _through_forward("score_plain")
    choose_positions = _through_forward("choose_positions")
    initial_vectors = _through_forward("initial_vectors")
